"""Trains a model: `python launch/pretrain.py --config FILE [key.path=value ...]`.

Also started by `accelerate launch`, `torchrun` or `srun`, which say how many processes take part.
"""

import argparse
import sys
import threading
import time

from stablelm.command_names import typed
from stablelm.errors import ConfigError, UserError
from stablelm.process_exit import report, report_failed_thread
from stablelm.programs.arguments import Parser, add_configuration, path_or_url

STARTED = time.time()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Pretrain a language model. Started again with the same arguments, a run resumes from its last "
        "checkpoint.",
        epilog="All keys: docs/configuration.md. Exit codes: 0 finished, 75 stopped early (run again), 78 bad input.",
    )
    add_configuration(parser)
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
    return start(
        files=arguments.config,
        overrides=arguments.overrides,
        resume=arguments.resume,
        print_config=arguments.print_config,
        argv=[*typed("pretrain").removeprefix("python ").split(), *argv],
        started=STARTED,
    )


def start(
    *, files: list[str], overrides: list[str], resume: str, print_config: bool, argv: list[str], started: float
) -> int:
    """Loads, checks and runs; returns the process's exit code."""
    from stablelm.config.load import dump, load
    from stablelm.engine.launch_environment import Launch, accelerate_flags, detect, unused_flags_warning

    launch = Launch()
    threading.excepthook = report_failed_thread
    try:
        launch = detect()
        loaded = load(files, overrides, world_size=launch.world_size)
        flags = accelerate_flags()
        from stablelm.train.prepare import prepare

        prepared = prepare(loaded, launch, flags, "auto" if print_config else resume)
    except UserError as error:
        report(error, launch.rank)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        return 130
    if print_config:
        if launch.rank == 0:
            print(dump(prepared.config), end="")
        return 0
    unused = unused_flags_warning()
    if unused and launch.rank == 0:
        print(unused, file=sys.stderr, flush=True)
    from stablelm.engine.process import environment

    environment.set_variables(prepared.config)  # before torch is imported
    from stablelm.train.run import run

    return run(prepared, source=resume, argv=argv, started=started)


if __name__ == "__main__":
    sys.exit(main())
