"""One HTML page of a run: `python launch/report.py RUN_DIR [--out FILE.html]`."""

import argparse
import os
import sys
from pathlib import Path

from stablelm.errors import ConfigError, StorageError
from stablelm.out_file import check_out
from stablelm.process_exit import exit_code_of
from stablelm.programs.arguments import Parser, local_path


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Makes one self-contained HTML page of a run, finished or running: loss, validation sets, "
        "throughput, memory, events, layers, samples, configuration and origin. It needs no network and no JavaScript.",
        epilog="Exit codes: 0 done, 74 the page cannot be written, 78 bad input.",
    )
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="the directory of a run (its run.dir)")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE.html", help="where the page goes; default: RUN_DIR/report.html"
    )
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> argparse.Namespace:
    """ConfigError for what is not a run, or a page that may not be written."""
    from stablelm.observe.page.run_files import check_run
    from stablelm.observe.page.run_page import NAME

    check_run(options.run_dir)
    if options.out is None:
        options.out = options.run_dir / NAME
        if not os.access(options.run_dir, os.W_OK) or options.out.is_dir():
            raise ConfigError(f"{options.out} may not be written by this user; name another file by --out")
    check_out(options.out)
    return options


def make(options: argparse.Namespace) -> None:
    from stablelm.observe.page.run_page import make_page

    out: Path = options.out
    try:
        size = make_page(options.run_dir, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}); name a file that can by --out") from None
    print(f"{out} ({size / 2**20:.1f} MiB)")


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: check(options), make)
