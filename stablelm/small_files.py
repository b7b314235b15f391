"""Small files that anybody may have put there: only regular ones are opened, and no more is read than they may hold."""

import errno
import os
import stat
from typing import Any

# What no state, manifest or summary of ours comes near.
MOST = 64 << 20
NOT_REGULAR = "not a regular file"


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading; nothing is waited for. Raises OSError, also for what is not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


def read_small(path: Any, most: int = MOST) -> bytes:
    """The content of a file, a Path or RemotePath, of at most `most` bytes.

    Raises OSError, also for a larger file and for a FIFO or device.
    """
    if not isinstance(path, os.PathLike):
        if path.stat().st_size > most:
            raise _too_large(path, most)
        return path.read_bytes()
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(path, most)
    return content


def _too_large(path: Any, most: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
