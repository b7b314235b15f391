"""Whole remote files kept on this machine's disk, at most so many bytes of them, shared by its processes.

A file is fetched by one process while the others wait for its lock, and gets its name when it is whole. The
files that were opened longest ago go first. Whatever goes wrong here, the file is read from its store.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stablelm.data.storage.options import ReadOptions, Stamp
from stablelm.data.storage.stores import base_name

CHUNK = 1 << 20


def kept(url: str, stamp: Stamp, options: ReadOptions, fetch: Callable[[], Any]) -> str | None:
    """Path of the whole file, fetched now if need be; None when it is not kept.

    `fetch` gives an open file at offset 0, whose reads may raise DataError.
    """
    if options.cache is None or not 0 < stamp.size <= options.cache_bytes:
        return None
    folder = Path(options.cache) / "files"
    key = hashlib.sha256(f"{url} {stamp.size} {stamp.tag}".encode()).hexdigest()[:16]
    path = folder / f"{key}-{base_name(url)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _used(path):
            return str(path)
        with _lock(path):
            if not _used(path):
                _download(path, stamp.size, options.cache_bytes, fetch)
            return str(path)
    except OSError:
        # A disk that is full or takes no locks: training goes on from the store.
        return None


def _lock(path: Path, **wait: Any) -> Any:
    import filelock

    # One object for each use: a thread that waits is then another holder.
    return filelock.FileLock(path.with_name(f".{path.name}.lock"), is_singleton=False, **wait)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _used(path: Path) -> bool:
    """Whether the file is there; notes that it is used now, by the time of access, since the other tells a change."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:
        return False
    return True


def _download(path: Path, size: int, limit: int, fetch: Callable[[], Any]) -> None:
    part = _part(path)
    try:
        with _lock(path.parent / "room"):
            _make_room(path.parent, limit - size, part)
            # The whole size counts from now on for others that make room.
            with open(part, "wb") as target:
                target.truncate(size)
        with fetch() as source, open(part, "r+b") as target:
            shutil.copyfileobj(source, target, CHUNK)
            if target.tell() != size:
                raise OSError(errno.EIO, "the copy is not whole")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _make_room(folder: Path, room: int, own: Path) -> None:
    """Deletes what was used longest ago until the rest fits into `room` bytes. Raises OSError when it cannot."""
    found = []
    for path in folder.iterdir():
        if path == own or path.suffix == ".lock" or (path.suffix == ".part" and _left_over(path)):
            continue
        # Another process may have deleted it just now.
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_atime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= room:
            return
        if path.suffix != ".part":
            path.unlink(missing_ok=True)
            total -= size
    if total > room:
        raise OSError(errno.ENOSPC, "what is fetched now takes all the room")


def _left_over(part: Path) -> bool:
    """Deletes a part whose process has died, which its lock shows; False while it is fetched."""
    import filelock

    try:
        with _lock(part.with_name(part.name[1 : -len(".part")]), timeout=0):
            part.unlink(missing_ok=True)
            return True
    except filelock.Timeout:
        return False
