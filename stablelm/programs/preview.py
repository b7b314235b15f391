"""Shows what a run would read: `stablelm preview --config FILE [key.path=value ...]`."""

import argparse
import sys

from stablelm.programs.arguments import Parser, add_configuration


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Shows what a run would read: its first documents, token statistics, and packed sequences with "
        "their borders."
    )
    add_configuration(parser)
    parser.add_argument("--documents", type=int, default=1000, help="documents to count; default: 1000")
    parser.add_argument("--sequences", type=int, default=2, help="packed sequences to show; default: 2")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    # Imported here, so that --help answers at once.
    from rich.console import Console

    from stablelm.config.load import load
    from stablelm.data.preview import prepare, preview
    from stablelm.process_exit import exit_code_of

    # A log has no width of its own: nothing is cut there.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    return exit_code_of(
        lambda: prepare(load(options.config, options.overrides, world_size=1)),
        lambda found: preview(*found, documents=options.documents, sequences=options.sequences, console=console),
    )
