"""Small file operations that survive a power cut, and the words for storage that cannot be written."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.errors import StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
# How local disks, network file systems and mounts say that they fail; ENOENT: what was written to has been removed.
FAILING = {
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EBUSY, errno.EXDEV, errno.ENOENT, errno.ENOLCK),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNREFUSED),
}
UNWRITABLE = DENIED | FAILING


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of one file: its size in bytes and the sha256 of its content in hex."""

    size: int
    sha256: str


def record_of(content: bytes) -> FileRecord:
    """The record of a file that holds `content`."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def record_of_file(path: CheckpointPath) -> FileRecord:
    """Reads the whole file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def write_new(path: CheckpointPath, content: bytes) -> FileRecord:
    """Writes a small new file that is there for good once this returns. Raises OSError."""
    if isinstance(path, Path):
        return write_durably(path, content)
    path.create(content)
    return record_of(content)


def write_durably(path: Path, content: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return record_of(content)


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


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@contextmanager
def writing(place: CheckpointPath) -> Iterator[None]:
    """Turns the OSErrors of full, unwritable or failing storage into a StorageError with `place` and the fix."""
    try:
        yield
    except StoreError as error:
        raise StorageError(
            f"cannot write a checkpoint to {place} ({error.strerror}): check its address, credentials and state, "
            "then run again; committed checkpoints are kept"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"no space left for a checkpoint in {place} ({error.strerror}): free space there, lower "
                "checkpoint.keep or set checkpoint.dir to another disk; committed checkpoints are kept"
            ) from error
        if error.errno in UNWRITABLE:
            fix = "make it a writable directory" if error.errno in DENIED else "look at its file system and run again,"
            raise StorageError(
                f"cannot write a checkpoint to {place} ({error.strerror}): {fix} or set checkpoint.dir to another "
                "directory; committed checkpoints are kept"
            ) from error
        raise
