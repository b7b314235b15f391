"""Signal and gradient at initialisation, predicted and measured: `python launch/probe.py --config FILE`."""

import argparse
import sys

from stablelm.programs.arguments import Parser, add_configuration, path_or_url


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Measures every layer of a model at its initialisation, on one CPU process and with the memory of "
        "a few layers, and puts the theory's prediction beside it: a table, probe.json, probe.png.",
        epilog="All keys: docs/configuration.md. Exit codes: 0 done, 77 text became unreadable, 78 bad input.",
    )
    add_configuration(parser)
    parser.add_argument(
        "--out", type=path_or_url, metavar="DIR", help="where probe.json and probe.png go; default: <run.dir>/probe"
    )
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="sequences of text; default: 2")
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens per sequence; default: data.seq_len, at most 256"
    )
    parser.add_argument(
        "--coordinates",
        metavar="depths=..,widths=..",
        help="instead, train every depth at the first width, and every width at the first depth, 10 steps at train.lr, "
        "and see whether features grow: depths=2,8,32,widths=64,128,256; writes coordinates.json and coordinates.png",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from stablelm.probe.coordinate_check import check
    from stablelm.probe.prober import probe

    given = {"out": arguments.out, "sequences": arguments.sequences, "seq_len": arguments.seq_len}
    if arguments.coordinates is not None:
        return check(arguments.config, arguments.overrides, arguments.coordinates, **given)
    return probe(arguments.config, arguments.overrides, **given)
