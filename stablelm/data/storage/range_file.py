"""Bytes of a file that may lie anywhere, read so that a cut connection loses nothing.

Retries happen on the raw bytes, below the decompressor: a fetch that failed is asked for again at the
same offset, so what reads above never sees a hole.
"""

import errno
import io
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from stablelm.data.storage import file_cache
from stablelm.data.storage.options import ReadOptions, Stamp
from stablelm.data.storage.ranges import changed
from stablelm.data.storage.retry import persist
from stablelm.data.storage.stall_monitor import reading
from stablelm.data.storage.stores import local_path, local_stamp, open_file
from stablelm.errors import DataError

# Compressed bytes held by one open local file; a remote one holds options.block.
LOCAL_BLOCK = 64 << 10
# Bytes that two requests for neighbouring ranges have in common.
OVERLAP = 64
# Compressed bytes inflated at once, which bounds the inflated lines that wait in memory: least and most.
SLICES = 16 << 10, 64 << 10


class LookEnded(DataError):
    """What is raised where a look at a file has taken as long as it may."""


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
        self.retries = 0
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
        """Moves without asking the store for anything but, once, the size."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset}.get(whence)
        self._moved(self.stamp().size + offset if base is None else base + offset)
        return self.offset

    def stamp(self) -> Stamp:
        """Size and tag of the file, which is opened for this at the first time."""
        known = self._options.stamps.get(self.url)
        return known or self._persist(lambda: self._opened()[1])

    def readinto(self, buffer: Any) -> int:
        """Fill from the current offset; 0 only at the end of the file."""
        if self._options.until is not None and time.monotonic() > self._options.until:
            raise LookEnded(
                f"{self.url}: no document in its first {self.offset} bytes, and no time to look further; check that it "
                "holds text, and that its store is fast enough"
            )
        data = self._persist(lambda: self._attempt(len(buffer)))
        buffer[: len(data)] = data
        self.offset += len(data)
        self._tail = bytes(data[-OVERLAP:])
        return len(data)

    def slices(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from the current offset to the end, a slice at once; each is let go when taken."""
        size = min(max(self._options.block // 8, SLICES[0]), SLICES[1])
        while block := self.read(self.block):
            start = self.offset - len(block)
            parts = deque(block[at : at + size] for at in range(0, len(block), size))
            del block
            while parts:
                part = parts.popleft()
                yield start, part
                start += len(part)

    def forget(self) -> None:
        """Says that the file is damaged: the run may go on with another copy."""
        if self._options.seen is not None:
            self._options.seen.forget(self.url)

    def close(self) -> None:
        self._drop()
        super().close()

    def _persist(self, attempt: Any) -> Any:
        return persist(
            attempt,
            name=self.url,
            budget=self._options.retry_budget,
            first_answer=self._options.first_answer,
            place=lambda: f" at byte {self.offset}",
            failed=self._failed,
        )

    def _attempt(self, size: int) -> memoryview:
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
            raise OSError(errno.EIO, "the store sent nothing where bytes must be")
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
        path = file_cache.kept(self.url, stamp, self._options, lambda: RangeFile(self.url, own))
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

    def _failed(self) -> None:
        self.retries += 1
        self._drop()

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # closing a broken connection may fail as well, and nothing depends on it
                return
