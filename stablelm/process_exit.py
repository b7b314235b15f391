"""How a program ends: a mistake is reported once, in words, and becomes an exit code."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from stablelm.errors import ConfigError, UserError
from stablelm.printable import printable
from stablelm.redaction import redacted

OTHERS_WAIT_SECONDS = 3.0
T = TypeVar("T")


def exit_code_of(check: Callable[[], T], work: Callable[[T], None]) -> int:
    """Runs `work` on what `check` gives, in one process; a mistake found by `check` is bad input (78)."""
    try:
        checked = check()
    except UserError as error:
        report(error)
        return ConfigError.exit_code
    try:
        work(checked)
    except UserError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def report(error: UserError, rank: int = 0) -> None:
    """Prints the error once for all ranks.

    Ranks above 0 hold back: where rank 0 fails for the same reason, its launcher ends them first.
    """
    if rank > 0:
        time.sleep(OTHERS_WAIT_SECONDS)
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


def report_failed_thread(failed: threading.ExceptHookArgs) -> None:
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
