"""Lines of a file that may lie anywhere, read so that a cut connection loses nothing.

Retries happen on the raw bytes, below the decompressor: a fetch that failed is asked for again at the
same offset, so the inflater above never sees a hole.
"""

import errno
import io
import random
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from stablelm.errors import DataError

# Compressed bytes held by one open file: a local read costs little, a remote one a round trip.
LOCAL_BLOCK = 64 << 10
REMOTE_BLOCK = 1 << 20
# Compressed bytes inflated at once, which bounds the inflated lines that wait in memory.
SLICE = 64 << 10
# A connection without a byte for so long is given up and retried.
STALL_SECONDS = 30.0
FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0

_jitter = random.Random()


def base_name(url: str) -> str:
    """Last part of a path or URL without its query: what names a file wherever it is stored."""
    path = url.split("?", 1)[0] if "://" in url else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def local_path(url: str) -> str | None:
    """The path of a local file, None for any other store."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or "::" in url else url


class RangeFile(io.RawIOBase):
    """Bytes of a local or remote file in order; a failed read is repeated at the same offset.

    One read is retried with a jittered exponential back-off for at most `retry_budget` seconds. Raises
    DataError, naming the file and the cause, when that is spent; at once when the file is missing,
    forbidden, not readable by ranges, or has another size than when it was first opened.
    """

    def __init__(self, url: str, *, retry_budget: float):
        self.url = url
        self.block = REMOTE_BLOCK if local_path(url) is None else LOCAL_BLOCK
        self.offset = 0
        self.size: int | None = None
        self.retries = 0
        self._retry_budget = retry_budget
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill from the current offset; 0 only at the end of the file."""
        deadline, delay = None, FIRST_DELAY
        while True:
            try:
                data = self._attempt(len(buffer))
                buffer[: len(data)] = data
                self.offset += len(data)
                return len(data)
            except DataError:
                raise
            except Exception as error:
                self._drop()
                if cause := _hopeless(error):
                    raise DataError(f"{self.url}: {cause}; {_mend(error)}") from error
                now = time.monotonic()
                deadline = now + self._retry_budget if deadline is None else deadline
                if now >= deadline:
                    raise DataError(
                        f"{self.url}: unreadable at byte {self.offset} for {self._retry_budget:g} s ({_words(error)}); "
                        "run again once the store answers, or raise data.retry_budget"
                    ) from error
                self.retries += 1
                time.sleep(min(delay * _jitter.uniform(0.5, 1.0), deadline - now))
                delay = min(2 * delay, LONGEST_DELAY)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go on at byte `offset`, counted from the start."""
        assert whence == io.SEEK_SET
        self.offset = offset
        if self._file is not None:
            self._file.seek(offset)
        return offset

    def close(self) -> None:
        self._drop()
        super().close()

    def _attempt(self, size: int) -> bytes:
        file, end = self._opened()
        if self.offset >= end:
            return b""
        data = file.read(min(size, end - self.offset))
        if not data:
            raise OSError(errno.EIO, "the store sent nothing where bytes must be")
        return data

    def _opened(self) -> tuple[Any, int]:
        """The file, at the current offset, and its size."""
        if self._file is not None and self.size is not None:
            return self._file, self.size
        self._file, size = _open(self.url, self.block)
        if self.size is not None and size != self.size:
            raise DataError(
                f"{self.url}: changed from {self.size} to {size} bytes while it was read; "
                "put the old file back, or start a new run"
            )
        self.size = size
        self._file.seek(self.offset)
        return self._file, size

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # closing a broken connection may fail as well, and nothing depends on it
                return


def _open(url: str, block: int) -> tuple[Any, int]:
    """An open file that can seek, and its size in bytes."""
    path = local_path(url)
    if path is not None:
        local = io.FileIO(path)
        return local, local.seek(0, io.SEEK_END)
    # fsspec and its asyncio stack are only needed for remote files.
    import fsspec

    filesystem, path = fsspec.url_to_fs(url, **_options(url))
    file: Any = filesystem.open(path, "rb", block_size=block, cache_type="none")
    size = getattr(file, "size", None)
    if size is None:
        file.close()
        raise io.UnsupportedOperation("the server does not tell the size of the file or serve parts of it")
    return file, size


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _hopeless(error: BaseException) -> str | None:
    """Why another try cannot help; None when it may."""
    if isinstance(error, io.UnsupportedOperation) or "range requests" in str(error):
        return "the server does not serve parts of a file (HTTP range requests)"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files"
    status = _status(error)
    if status is not None:
        # Of the client errors only a time-out and "too many requests" pass by themselves.
        return f"the server answers {status}" if 400 <= status < 500 and status not in (408, 425, 429) else None
    if isinstance(error, FileNotFoundError):
        # fsspec says "not found" for any failed first request, with the real reason as the cause.
        return "the file is not there any more" if error.__cause__ is None else _hopeless(error.__cause__)
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return _words(error)
    if isinstance(error, (ImportError, NotImplementedError, TypeError, AttributeError, ValueError)):
        return _words(error)
    return None


def _status(error: BaseException) -> int | None:
    """HTTP status that aiohttp, the hub's client or botocore carry in an error."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if status is None and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif status is None:
        status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _mend(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "install the package that reads this store"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "use fewer data.lanes, or raise the limit with ulimit -n"
    if isinstance(error, io.UnsupportedOperation) or "range requests" in str(error):
        return "download the files, or use a server that supports ranges"
    return "put the file back and make it readable, then run again"


def _words(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(str(text).split())[:200]


def open_lines(url: str, *, retry_budget: float) -> Iterator[bytes]:
    """Lines of a file, without their newline and without blank ones; see `numbered_lines`."""
    return (line for _, line in numbered_lines(url, retry_budget=retry_budget))


def numbered_lines(url: str, *, retry_budget: float) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without newline) for each line that is not blank.

    `.gz` (any number of members) and `.zst` (any number of frames) are inflated, other names read as
    they are. A byte order mark at the start is dropped; the last line may lack its newline.
    `retry_budget`: seconds. Raises DataError naming the file: unreachable, truncated or damaged.
    """
    with RangeFile(url, retry_budget=retry_budget) as file:
        number, carry = 0, []
        for chunk in _inflated(file):
            first, *rest = chunk.split(b"\n")
            carry.append(first)
            if not rest:
                continue
            rest.insert(0, b"".join(carry))
            carry = [rest.pop()]
            for line in rest:
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line and not line.isspace():
                    yield number, line
        line = b"".join(carry)
        line = line if number else line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield number + 1, line


def _inflated(file: RangeFile) -> Iterator[bytes]:
    name = base_name(file.url)
    if name.endswith(".gz"):
        return _members(file, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16))
    if name.endswith(".zst"):
        import zstandard

        return _members(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    return _blocks(file)


def _blocks(file: RangeFile) -> Iterator[bytes]:
    return iter(lambda: file.read(file.block), b"")


def _members(file: RangeFile, inflater: Callable[[], Any]) -> Iterator[bytes]:
    """Inflate gzip members or zstd frames that follow one another."""
    current = None
    try:
        for block in _blocks(file):
            for start in range(0, len(block), SLICE):
                data = block[start : start + SLICE]
                while data:
                    # Zeros between members are padding.
                    if current is None and not (data := data.lstrip(b"\0")):
                        break
                    current = current or inflater()
                    yield current.decompress(data)
                    data = current.unused_data
                    current = None if current.eof else current
    except (zlib.error, _zstd_error()) as error:
        raise DataError(
            f"{file.url}: damaged near byte {file.offset} ({_words(error)}); "
            "replace it by an intact copy, then run again"
        ) from error
    if current is not None:
        raise DataError(
            f"{file.url}: truncated, it ends at byte {file.offset} in the middle of its compressed text; "
            "replace it with an intact copy and run again"
        )


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
