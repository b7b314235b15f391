"""A run before it starts, on any number of accelerators: `python launch/plan.py --config FILE --world-size W`."""

import argparse
import sys

from stablelm.programs.arguments import Parser, add_configuration, path_or_url


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Parameters, peak memory per GPU, collectives, FLOPs and an estimated step time of a run, for any "
        "number of ranks, in one CPU process: no GPU, no network, no data.",
        epilog="All keys: docs/configuration.md; how to read a plan: docs/planning.md. Exit codes: 0 done, 74 the file "
        "cannot be written, 78 bad input.",
    )
    add_configuration(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks, one an accelerator")
    parser.add_argument(
        "--gpu", default="h100-80", metavar="NAME", help="a100-80, h100-80 (default), h200, b200 or mi300x"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--quick", "--closed-form", action="store_true", help="no simulated engine: faster, less exact")
    parser.add_argument("--out", type=path_or_url, metavar="FILE.json", help="the same figures for programs")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from stablelm.plan.planner import plan

    return plan(
        arguments.config,
        arguments.overrides,
        world_size=arguments.world_size,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        out=arguments.out,
        simulated=not arguments.quick,
    )
