"""Which learning rate for a method at a size, from recorded studies: `python launch/advise.py --method M ...`."""

import argparse
import sys
from pathlib import Path

from stablelm.command_names import typed
from stablelm.errors import ConfigError
from stablelm.programs.arguments import Parser, local_path, run


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="A method's learning rate, warm-up and expected loss at a size, from recorded studies within a "
        "factor of four in depth, width and tokens, and how well that is known.",
        epilog="How the records were made: docs/studies.md. Exit codes: 0, also without evidence, 78 bad input.",
    )
    parser.add_argument("--method", required=True, metavar="M", help="a method's name")
    parser.add_argument("--depth", required=True, type=int, metavar="N", help="layers")
    parser.add_argument("--d-model", required=True, type=int, metavar="D", help="width of the stream")
    parser.add_argument("--tokens", required=True, type=float, metavar="T", help="of the run, as in 5e8")
    parser.add_argument("--records", action="append", default=[], type=local_path, metavar="FILE", help="further ones")
    parser.add_argument("--study", type=local_path, metavar="FILE", help="write the study that would tell here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    return run(lambda: _advise(arguments))


def _advise(arguments: argparse.Namespace) -> None:
    from stablelm.methods import catalogue
    from stablelm.new_files import replace_file
    from stablelm.study.advice_text import words
    from stablelm.study.advise import Question, advise, study_text
    from stablelm.study.records import PACKAGED, read_records

    catalogue.find(arguments.method)
    for flag, value in (("--depth", arguments.depth), ("--d-model", arguments.d_model), ("--tokens", arguments.tokens)):
        if not value >= (2 if flag == "--d-model" else 1) or value == float("inf"):
            raise ConfigError(f"{flag} {value:g} must be at least {2 if flag == '--d-model' else 1}")
    question = Question(arguments.method, arguments.depth, arguments.d_model, round(arguments.tokens))
    records = read_records([PACKAGED, *arguments.records])
    print(words(question, advise(question, records), records), end="")
    if arguments.study is not None:
        if Path(arguments.study).exists():
            raise ConfigError(f"--study {arguments.study} exists; name a new file")
        replace_file(arguments.study, study_text(question))
        print(f"written: {arguments.study}; run it by {typed('study')} run --study {arguments.study}")
