"""What a user can cause, each with the exit code that scripts rely on."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from stablelm.printable import printable
from stablelm.redaction import redacted


class UserError(Exception):
    """A mistake or mishap outside the program: printed as one sentence, never as a traceback.

    Of two arguments the first says what is wrong and the second what to do.
    """

    exit_code = 1

    def __str__(self) -> str:
        """The sentence, without credentials and control characters that a path or an answer brought into it."""
        return printable(redacted(": ".join(map(str, self.args))))


class ConfigError(UserError):
    """A bad configuration or input, found before anything was created."""

    exit_code = 78


class DataError(UserError):
    """Text that was there became unavailable or proved damaged after the start."""

    exit_code = 77


class CheckpointError(UserError):
    """No checkpoint at the given place can be loaded."""

    exit_code = 78


class StorageError(UserError):
    """The storage of the run directory is full or cannot be written."""

    exit_code = 74


class DivergedError(UserError):
    """Too many updates in a row had to be left out, or spikes went on after all rewinds."""

    exit_code = 76


EXIT_FINISHED = 0
EXIT_STOPPED_EARLY = 75
EXIT_RANK_LOST = 80


class ProcessLostError(UserError):
    """A process of the run was ended from outside, as by the kernel for want of memory."""

    exit_code = EXIT_RANK_LOST


SHOWN = 8


class Problems:
    """Problems, one sentence each, reported at once so that all can be fixed at once."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    @contextlib.contextmanager
    def collecting(self, key: str = "") -> Iterator[None]:
        """Collects a ConfigError of the with block, and a DataError under `key`, instead of raising it."""
        try:
            yield
        except ConfigError as error:
            self._sentences.append(str(error))
        except DataError as error:
            if not key:
                raise
            self._sentences.append(f"{key}: {error}")

    def raise_any(self) -> None:
        """Raises ConfigError with a line for each problem; of many only the first few and the number of the others."""
        if self._sentences:
            rest = len(self._sentences) - SHOWN
            more = [f"and {rest} more problems of this kind"] if rest > 0 else []
            raise ConfigError("\n".join([*self._sentences[:SHOWN], *more]))


def listed(items: Sequence[str], *, show: Callable[[str], str] = repr) -> str:
    """The items, separated by commas; of many only the first few and the number of the others."""
    rest = len(items) - SHOWN
    return ", ".join(map(show, items[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")
