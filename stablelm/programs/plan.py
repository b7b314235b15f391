"""A run before it starts, on any number of accelerators: `python launch/plan.py --config FILE --world-size W`."""

import argparse
import sys

from stablelm.observe.accelerators import ACCELERATORS, DEFAULT, FLAGS
from stablelm.programs.arguments import Parser, add_configuration, path_or_url

HELP = {
    "--peak-tflops": "dense bf16 TFLOPS of an accelerator that the table lacks; also needs the next two",
    "--memory-gb": "its memory in GB (1e9 bytes)",
    "--bandwidth": "its memory bandwidth in GB/s",
    "--link-bandwidth": "GB/s each way to the GPUs of its node; 32 (PCIe Gen4 x16) if it is not in the table",
    "--network-bandwidth": "GB/s each way to other nodes, a GPU's share; 25 (200 Gb/s) if it is not in the table",
    "--host-bandwidth": "GB/s each way to the host's memory; 32 if it is not in the table",
    "--watts": "power limit of a GPU, for the energy",
}


def world_sizes(text: str) -> tuple[int, ...]:
    """Type of an argument `8,16,32`: each number once, in the order given."""
    found = []
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdigit() and int(word) > 0):
            raise argparse.ArgumentTypeError(f"{word.strip()!r} is not an integer of at least 1, as in 8,16,32")
        found.append(int(word))
    return tuple(dict.fromkeys(found))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Peak memory per GPU, step time, hours and cost of a run for any number of GPUs, and the largest "
        "depth that fits, in one CPU process: no GPU, no network, no data.",
        epilog="All keys: docs/configuration.md; how to read a plan: docs/planning.md. Exit codes: 0 done, 74 the file "
        "cannot be written, 78 bad input.",
    )
    add_configuration(parser)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--world-size", type=int, metavar="W", help="number of GPUs, one process each")
    ranks.add_argument("--world-sizes", type=world_sizes, metavar="W,W,...", help="a table over several numbers")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(ACCELERATORS)}; default: {DEFAULT}")
    for flag in FLAGS:
        parser.add_argument(flag, type=float, metavar="X", help=HELP[flag])
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="price of a GPU-hour, for the cost")
    parser.add_argument("--quick", "--closed-form", action="store_true", help="no dry run: faster, less exact")
    parser.add_argument("--out", type=path_or_url, metavar="FILE.json", help="the same figures for programs")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from stablelm.plan.planner import plan

    figures = {flag: getattr(arguments, flag.removeprefix("--").replace("-", "_")) for flag in FLAGS}
    return plan(
        arguments.config,
        arguments.overrides,
        world_sizes=arguments.world_sizes or (arguments.world_size,),
        gpu=arguments.gpu,
        figures=figures,
        gpus_per_node=arguments.gpus_per_node,
        price=arguments.price,
        out=arguments.out,
        simulated=not arguments.quick,
    )
