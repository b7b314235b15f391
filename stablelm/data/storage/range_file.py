"""Bytes of a file in any store, read so that a cut connection loses nothing.

Retries happen on the raw bytes, below the decompressor: a failed fetch is repeated at the
same offset, so what reads above never sees a hole. Remote files may be kept whole on this machine's disk, at most so
many bytes of them, shared by its processes: one process fetches a file while the others wait for its lock, and the
files that were opened longest ago are deleted first. Whatever fails there, the file is read from its store.
fsspec 2026.9 has neither the limit nor the lock: of 20 reads by four processes 14 returned part of a file without an
error (simplecache), or each process downloaded every file (filecache).
"""

import errno
import hashlib
import io
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelm.data.storage.options import FAMILIES, PINNED_FILE, ReadOptions, Stamp, base_name, changed, local_path
from stablelm.data.storage.retry import Retries
from stablelm.data.storage.stall_monitor import reading
from stablelm.data.storage.stores import filesystem, tag
from stablelm.errors import DataError
from stablelm.small_files import open_regular

# Compressed bytes held by one open local file; a remote one holds options.block.
LOCAL_BLOCK = 64 << 10
# Bytes that two requests for neighbouring ranges have in common.
OVERLAP = 64
# Compressed bytes inflated at once, which bounds the inflated lines that wait in memory: least and most.
SLICES = 16 << 10, 64 << 10
# Bytes copied at once into the cache.
CHUNK = 1 << 20


class LookEnded(DataError):
    """Raised when the time for a look at a file is over."""


class RangeFile(io.RawIOBase):
    """A file that can be read and sought; a failed read is repeated at the same offset.

    One read is retried for at most `options.retry_budget` seconds. Raises DataError, naming the file and
    the cause, when that is spent; at once when the file is missing, forbidden, not readable by ranges, or
    is not what it was when this run first opened it (size, ETag or time of change).
    """

    def __init__(self, url: str, options: ReadOptions):
        self.url = url
        self.block = options.block if local_path(url) is None else LOCAL_BLOCK
        self.offset = 0
        self._tail = b""  # what was read before this offset
        self._options = options
        self._file: Any = None
        self._local: Stamp | None = None  # of the open file, if it is on a disk
        self._keeps = options.cache_bytes > 0 and local_path(url) is None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; only the first seek from the end asks the store for the size."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset}.get(whence)
        self._moved(self.stamp().size + offset if base is None else base + offset)
        return self.offset

    def stamp(self) -> Stamp:
        """Size and tag of the file, which is opened for this at the first time."""
        if known := self._options.stamps.get(self.url):
            return known
        with self._retries() as retries:
            while True:
                try:
                    return self._opened()[1]
                except Exception as error:
                    retries.wait(error, self._failed(error))

    def readinto(self, buffer: Any) -> int:
        """Fill from the current offset; 0 only at the end of the file."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def slices(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from the current offset to the end, a slice at once; each is freed when taken."""
        size = min(max(self._options.block // 8, SLICES[0]), SLICES[1])
        while block := bytes(self._next(self.block)):
            start = self.offset - len(block)
            parts = deque(block[at : at + size] for at in range(0, len(block), size))
            del block
            while parts:
                part = parts.popleft()
                yield start, part
                start += len(part)

    def forget(self) -> None:
        """Records that the file is damaged: the run may continue with another copy."""
        if self._options.seen is not None:
            self._options.seen.forget(self.url)

    def close(self) -> None:
        self._drop()
        super().close()

    def _retries(self) -> Retries:
        return Retries(self.url, budget=self._options.retry_budget, first_answer=self._options.first_answer)

    def _next(self, size: int) -> memoryview:
        """Up to so many bytes from the current offset, which is then behind them; empty only at the end of the file."""
        if self._options.until is not None and time.monotonic() > self._options.until:
            raise LookEnded(
                f"{self.url}: no document in its first {self.offset} bytes, and no time to look further; check that it "
                "holds text, and that its store is fast enough"
            )
        with self._retries() as retries:
            while True:
                try:
                    data = self._fetch(size)
                    break
                except Exception as error:
                    retries.wait(error, self._failed(error))
        self.offset += len(data)
        self._tail = bytes(data[-OVERLAP:])
        return data

    def _fetch(self, size: int) -> memoryview:
        """Up to so many bytes from the current offset, empty at the end."""
        file, stamp = self._opened()
        if self.offset >= stamp.size:
            return memoryview(b"")
        # What was read last is asked for again: the headers of a server that sends other bytes may say nothing of it.
        before = self._tail if self._local is None else b""
        if before:
            file.seek(self.offset - len(before))
        wanted = len(before) + min(size, stamp.size - self.offset)
        with nullcontext() if self._local is not None else reading(self.url):
            data = memoryview(file.read(wanted))
        if self._local is not None and (now := local_stamp(file)) != self._local:
            raise changed(self.url, self._local, now)
        if len(data) > wanted:
            raise DataError(
                f"{self.url}: the store sent {len(data)} bytes where {wanted} were requested; use another server or "
                "mirror, or download the files"
            )
        if data[: len(before)] != before:
            raise DataError(
                f"{self.url}: changed while it was read, the store sent other bytes before byte {self.offset} than the "
                "first time; put the old file back, or use another server or mirror"
            )
        data = data[len(before) :]
        if not data:
            raise OSError(errno.EIO, "the store sent no bytes where some were expected")
        return data

    def _opened(self) -> tuple[Any, Stamp]:
        """The file, at the current offset, and its stamp."""
        known = self._options.stamps.get(self.url)
        if self._file is not None and known is not None:
            return self._file, known
        if known is None or not self._keeps or not self._open_kept(known):
            self._file, stamp = open_file(self.url, self._options)
            if known is None and self._options.seen is not None:
                self._options.seen.confirm(self.url, stamp)
            known = self._options.stamps.setdefault(self.url, stamp)
            if stamp != known:
                raise changed(self.url, known, stamp)
            if self._keeps:
                self._open_kept(stamp)
        self._local = local_stamp(self._file) if isinstance(self._file, io.FileIO) else None
        file: Any = self._file
        file.seek(self.offset)
        return file, known

    def _open_kept(self, stamp: Stamp) -> bool:
        """Goes on with the whole file on this machine's disk, if it is or can be kept there."""
        own = replace(self._options, cache_bytes=0)
        path = cached(self.url, stamp, self._options, lambda: RangeFile(self.url, own))
        if path is None:
            return False
        try:
            local = io.FileIO(path)
        except FileNotFoundError:  # deleted since, to make room
            return False
        self._drop()
        self._file = local
        return True

    def _moved(self, offset: int) -> None:
        if offset != self.offset:
            self._tail = b""
        self.offset = offset
        if self._file is not None:
            self._file.seek(offset)

    def _failed(self, error: Exception) -> str:
        """Closes the file, which the next attempt opens again; where the failure was, in words."""
        self._drop()
        return f" at byte {self.offset}"

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # closing a broken connection may fail as well, and nothing depends on it
                return


def open_file(url: str, options: ReadOptions) -> tuple[Any, Stamp]:
    """An open file that can seek, and its stamp; remote ones fetch what is read, without reading ahead."""
    path = local_path(url)
    if path is not None:
        local = io.FileIO(open_regular(path))
        return local, local_stamp(local)
    scheme = url.partition("://")[0]
    family = FAMILIES.get(scheme, scheme) if "::" not in url else None
    # Each with its client, which is slow to import.
    if PINNED_FILE.fullmatch(url):
        from stablelm.data.storage.hub import HubFile as Opened
    elif family == "http":
        from stablelm.data.storage.http_file import HttpFile as Opened
    elif family == "s3":
        from stablelm.data.storage.http_file import S3File as Opened
    else:
        return _open_by_fsspec(url, options)
    opened = Opened(url, options)
    return opened, opened.stamp


def _open_by_fsspec(url: str, options: ReadOptions) -> tuple[Any, Stamp]:
    store, path = filesystem(url, options)
    file = store.open(path, "rb", block_size=options.block, cache_type="none")
    # What was found in opening the file, where the store keeps it.
    info = getattr(file, "details", None) or store.info(path)
    return file, Stamp(int(info["size"]), tag(info))


def local_stamp(file: io.FileIO) -> Stamp:
    status = os.fstat(file.fileno())
    return Stamp(status.st_size, str(status.st_mtime_ns))


def cached(url: str, stamp: Stamp, options: ReadOptions, fetch: Callable[[], Any]) -> str | None:
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
        # A disk that is full or takes no locks: training continues from the store.
        return None


def _lock(path: Path, **wait: Any) -> Any:
    import filelock

    # One object for each use: a thread that waits is then another holder.
    return filelock.FileLock(path.with_name(f".{path.name}.lock"), is_singleton=False, **wait)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _used(path: Path) -> bool:
    """Whether the file exists; marks it as used now by its time of access, since that of change shows a change."""
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
                raise OSError(errno.EIO, "the copy is incomplete")
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
        raise OSError(errno.ENOSPC, "the files that are being fetched take all the space")


def _left_over(part: Path) -> bool:
    """Deletes a part whose process has died, which its lock shows; False while it is fetched."""
    import filelock

    try:
        with _lock(part.with_name(part.name[1 : -len(".part")]), timeout=0):
            part.unlink(missing_ok=True)
            return True
    except filelock.Timeout:
        return False
