"""Trains a model: `python launch/pretrain.py --config FILE [key.path=value ...]`.

Also started by `accelerate launch`, `torchrun` or `srun`, which say how many processes take part.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.arguments import Parser, path_or_url

STARTED = time.time()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Pretrain a language model. Started again with the same arguments, a run goes on where it was.",
        epilog="All keys: docs/configuration.md. Exit codes: 0 finished, 75 stopped early (run again), 78 bad input.",
    )
    parser.add_argument(
        "--config", action="append", default=[], type=path_or_url, metavar="FILE", help="YAML file; later ones win"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="single keys; these win over files")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument(
        "--resume",
        default="auto",
        type=path_or_url,
        metavar="auto|none|PATH",
        help="auto: newest checkpoint of run.dir, if any (default); none: only a new run; PATH: that checkpoint",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    from stablelm.train.start import start

    return start(
        files=arguments.config,
        overrides=arguments.overrides,
        resume=arguments.resume,
        print_config=arguments.print_config,
        argv=["launch/pretrain.py", *argv],
        started=STARTED,
    )


if __name__ == "__main__":
    sys.exit(main())
