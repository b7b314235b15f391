"""What a user can cause, each with the exit code that scripts rely on."""

from stablelm.printable import printable
from stablelm.redaction import redacted


class UserError(Exception):
    """A mistake or mishap outside the program: printed as one sentence, never as a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """The sentence, without credentials and control characters that a path or an answer brought into it."""
        return printable(redacted(super().__str__()))


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
