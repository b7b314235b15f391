"""From the command line to an exit code: what goes wrong is said once, in words."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from stablelm.engine.launch_environment import Launch, accelerate_flags, detect, unused_flags_warning
from stablelm.errors import ConfigError, UserError
from stablelm.printable import printable
from stablelm.redaction import redacted

OTHERS_WAIT_SECONDS = 3.0
T = TypeVar("T")


def start(
    *, files: list[str], overrides: list[str], resume: str, print_config: bool, argv: list[str], started: float
) -> int:
    """Loads, checks and runs; returns the process's exit code."""
    from stablelm.config.load import dump, load

    launch = Launch()
    threading.excepthook = say_failed_thread
    try:
        launch = detect()
        loaded = load(files, overrides, world_size=launch.world_size)
        flags = accelerate_flags()
        from stablelm.train.prepare import prepare

        prepared = prepare(loaded, launch, flags, "auto" if print_config else resume)
    except UserError as error:
        report(error, launch)
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
    from stablelm.train.run import run

    return run(prepared, resume=resume, argv=argv, started=started)


def exit_code_of(check: Callable[[], T], work: Callable[[T], None]) -> int:
    """Runs `work` on what `check` gives, in one process; a mistake found by `check` is bad input (78)."""
    try:
        checked = check()
    except UserError as error:
        report(error, Launch())
        return ConfigError.exit_code
    try:
        work(checked)
    except UserError as error:
        report(error, Launch())
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def report(error: UserError, launch: Launch) -> None:
    """Prints the error once for all ranks.

    Ranks above 0 hold back: where rank 0 fails for the same reason, its launcher ends them first.
    """
    if launch.rank > 0:
        time.sleep(OTHERS_WAIT_SECONDS)
        print(f"rank {launch.rank}: error: {error}", file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


def say_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """For threads of libraries, such as TensorBoard's writer: a file that they lose is no fault of the program."""
    if isinstance(failed.exc_value, OSError):
        print(printable(redacted(f"warning: {failed.exc_value}")), file=sys.stderr, flush=True)
    else:
        threading.__excepthook__(failed)


def end_at_once(code: int) -> None:
    """Ends the process without waiting for other ranks, threads or process groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
