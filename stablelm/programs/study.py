"""Depth studies: `python launch/study.py expand|run|submit|status|report --study FILE`."""

import argparse
import sys

from stablelm.programs.arguments import Parser, path_or_url, run

ACTIONS = {
    "expand": "lists the cells with parameters, FLOPs and predicted hours, and runs nothing",
    "run": "runs what is open on this machine; started again it continues",
    "submit": "submits what is open as Slurm arrays, and a job that submits what follows",
    "status": "how far it is, once or every few seconds",
    "report": "a page, Markdown, tables and figures of the results so far",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Trains models that differ in method, depth and more, each at its best learning rate, and compares "
        "them with several seeds.",
        epilog="docs/studies.md leads from a question to a report. Exit codes: 0 done, 1 runs failed, 75 stopped early "
        "(run again), 78 bad input.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    for name, words in ACTIONS.items():
        own = actions.add_parser(name, help=words, description=words)
        own.add_argument("--study", required=True, type=path_or_url, metavar="FILE", help="the study file")
        if name == "expand":
            own.add_argument("--fit", action="store_true", help="plan every run on resources.gpu, in minutes")
        if name in ("run", "submit"):
            own.add_argument("--jobs", type=int, metavar="N", help="runs at once, in place of limits.jobs")
        if name == "run":
            own.add_argument("--hours", type=float, metavar="H", help="stop after them, in place of limits.hours")
        if name == "submit":
            own.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of sbatch, as -- --time=12:00:00")
        if name == "report":
            own.add_argument("--out", type=path_or_url, metavar="DIR", help="default: the study's folder, report/")
            own.add_argument("--records", type=path_or_url, metavar="FILE", help="also what advise reads")
        if name == "status":
            own.add_argument("--every", type=float, metavar="SECONDS", help="again and again, until it is done")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from stablelm.study import commands

    code = 0

    def work() -> None:
        nonlocal code
        code = getattr(commands, arguments.action)(arguments)

    return run(work) or code
