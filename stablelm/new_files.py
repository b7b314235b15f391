"""Files and folders of a run directory, where anybody may have put links: always created, and no link is followed.

The run directory itself and its parents may be links, as on cluster file systems; what lies below is the run's own.
"""

import errno
import os
import stat
import uuid
from pathlib import Path
from typing import BinaryIO

from stablelm.redaction import redacted

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a small file in one step, in place of a file or link of its name; text without its credentials.

    Raises OSError; nothing is left then.
    """
    if isinstance(content, str):
        content = redacted(content).encode(errors="surrogateescape")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(os.open(temporary, _NEW, 0o666), "wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_new(path: Path) -> BinaryIO:
    """A new empty file to write, after a file or link of its name is removed. Raises OSError."""
    clear(path)
    return open(os.open(path, _NEW, 0o666), "wb")


def clear(path: Path) -> None:
    """Removes a file or link, so that a library which opens the name makes a file. Raises OSError."""
    path.unlink(missing_ok=True)


def open_to_append(path: Path) -> BinaryIO:
    """An unbuffered file to which is appended; a new one where there is none. Raises OSError for links and devices."""
    descriptor = os.open(path, _APPEND, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "ab", buffering=0)


def make_folder(path: Path) -> Path:
    """A folder of this name that is no link, made where there is none. Raises OSError."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, f"a link to {os.readlink(path)!r}, which is not followed", str(path))
    return path


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and forces it to the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Forces the names in a directory to the disk: a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_to_new(source: Path, target: Path) -> None:
    """Renames a directory in one step onto a name that is free. Raises FileExistsError if it is not, and OSError."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
