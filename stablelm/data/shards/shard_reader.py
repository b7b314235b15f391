"""Reading prepared shards: rows by number as arrays of tokens; see `shard_format` for the layout.

Remote ones are read through a cache of pages, which the readers of a process share. fsspec's BlockCache (2026.9) limits
memory by file: with the same memory in all, 64 readers of one shard fetched 2,554 pages with it, and 52 with this one.
"""

import hashlib
import math
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stablelm.data.shards.shard_format import BLOCK, MAKE, ShardContent, crc32, mask_url, read_footer, source_name
from stablelm.data.storage.options import ReadOptions, local_path
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError
from stablelm.small_files import MOST, open_regular, read_small

ROOM = 256 << 20  # bytes of pages a process keeps
SMALLEST, LARGEST = 64 << 10, 1 << 20  # bytes of a page: a request costs a round trip, and every lane keeps some


class PageCache:
    """The pages read last, over all files of a process; `readers` go on at different places. Thread-safe."""

    def __init__(self, readers: int):
        self.size = min(LARGEST, max(SMALLEST, ROOM // (4 * readers)))
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, url: str, number: int) -> bytes | None:
        with self._lock:
            page = self._kept.get((url, number))
            if page is not None:
                self._kept.move_to_end((url, number))
            return page

    def keep(self, url: str, number: int, page: bytes) -> None:
        with self._lock:
            self._kept[url, number] = page
            while len(self._kept) * self.size > ROOM:
                self._kept.popitem(last=False)


class PagedFile:
    """Bytes of a file in any store. Raises DataError as `RangeFile` does. Thread-safe."""

    def __init__(self, url: str, pages: PageCache, *, options: ReadOptions):
        self._url, self._pages = url, pages
        self._file = RangeFile(url, options)
        self._lock = threading.Lock()
        self.size = self._file.stamp().size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop-1."""
        size = self._pages.size
        numbers = range(start // size, -(-stop // size))
        joined = b"".join([self._page(number) for number in numbers])
        return joined[start - numbers.start * size : stop - numbers.start * size]

    def unchanged(self) -> None:
        """`RangeFile` notices another size by itself."""

    @staticmethod
    def whole(url: str, *, options: ReadOptions) -> bytes | None:
        """All bytes of a small file; None if the file does not exist."""
        with RangeFile(url, options) as file:
            try:
                if file.stamp().size > MOST:
                    raise DataError(f"{url}: has {file.stamp().size} bytes, more than the {MOST} that it may have")
                return file.readall()
            except DataError as error:
                if _is_missing(error.__cause__):
                    return None
                raise

    def _page(self, number: int) -> bytes:
        with self._lock:
            page = self._pages.find(self._url, number)
            if page is None:
                page = self._fetch(number * self._pages.size, min((number + 1) * self._pages.size, self.size))
                self._pages.keep(self._url, number, page)
            return page

    def _fetch(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        parts = []
        while start < stop:
            parts.append(self._file.read(stop - start))
            if not parts[-1]:
                raise DataError(f"{self._url}: ends at byte {start}; put the old file back, or start a new run")
            start += len(parts[-1])
        return b"".join(parts)


def _is_missing(error: BaseException | None) -> bool:
    """Whether a store reports that a file does not exist, rather than that it cannot be reached."""
    if error is None:
        return False
    if getattr(error, "status", None) == 404:
        return True
    if isinstance(error, FileNotFoundError):
        # fsspec says so of any failed first request, with the real reason as the cause.
        return error.__cause__ is None or _is_missing(error.__cause__)
    return False


PART = 1 << 16  # tokens handed on at once, unless a document is longer
READ = 8 << 20  # bytes read at once where all are
COUNTED = 1 << 16  # rows looked at at once


class MappedFile:
    """A file of this machine in the address space. Raises DataError when it cannot be opened."""

    def __init__(self, path: str):
        self._path = path
        try:
            with open(open_regular(path), "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            reason = getattr(error, "strerror", None) or "it is empty"
            raise DataError(f"{path}: cannot be read ({reason}); put the shard back, or {MAKE}") from None
        self._view = memoryview(self._map)
        self.size = len(self._map)

    def read(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]

    def unchanged(self) -> None:
        """Raises DataError if the file has another size now: reading its missing pages would kill the process."""
        if self._map.size() != self.size:
            raise DataError(f"{self._path}: changed while it was read; put the old file back, or start a new run")


class TokenShard:
    """An open shard; without `masked` its mask is not looked at.

    Raises DataError when it is damaged, or made with another tokenizer than `tokenizer` (a hash).
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: str | None,
        options: ReadOptions,
        pages: PageCache | None = None,
        masked: bool = True,
    ):
        self.url = url
        self._content = _open(url, options, pages)
        self.footer = read_footer(self._content, url)
        if tokenizer is not None and self.footer.tokenizer != tokenizer:
            raise DataError(
                f"{url}: made with another tokenizer (sha256 {self.footer.tokenizer[:12]}..., the run has "
                f"{tokenizer[:12]}...); set data.tokenizer to that one, or {MAKE}"
            )
        self._sums = np.frombuffer(self._content.read(self.footer.sums, self.footer.start), "<u4")
        self._unchecked = np.ones(len(self._sums), bool)
        self._view = self._ends = None
        if isinstance(self._content, MappedFile):
            self._view = self._content.read(0, self.footer.index)
            self._ends = np.frombuffer(self._content.read(self.footer.index, self.footer.sums), "<i8")
        self.mask = _mask(url, self.footer.rows, options) if masked else None

    def take(self, rows: np.ndarray | range) -> "ShardRows":
        """The rows of these numbers, all of which the shard has, in their order; int64 (rows,) as an array.

        One that is masked or has no token but eos has no tokens.
        """
        numbers = np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
        if not len(numbers):
            return ShardRows(self, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._content.unchanged()
        begins, ends = self._spans(numbers)
        if (ends < begins).any() or begins.min() < 0 or ends.max() > self.footer.tokens:
            raise DataError(f"{self.url}: damaged, its rows do not follow one another; {MAKE}")
        without = ends - begins < 2
        if self.mask is not None:
            without |= (self.mask[numbers >> 3] >> (numbers & 7) & 1).astype(bool)
        return ShardRows(self, begins, np.where(without, begins, ends))

    def join(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens begin..end-1 of the shard for each of these pairs, one after the other."""
        kind = self.footer.dtype
        begins, ends = begins * kind.itemsize, ends * kind.itemsize
        self._check_blocks(begins, ends)
        spans = zip(begins.tolist(), ends.tolist(), strict=True)
        if self._view is not None:
            # Of all ways to copy many short spans, joining views costs the least for each of them.
            view = self._view
            joined = b"".join([view[begin:end] for begin, end in spans])
        else:
            joined = b"".join([self._content.read(begin, end) for begin, end in spans])
        tokens = np.frombuffer(joined, kind)
        if len(tokens) and (largest := int(tokens.max())) >= self.footer.pieces:
            raise DataError(
                f"{self.url}: damaged, it holds the token {largest} of a vocabulary of {self.footer.pieces}; {MAKE}"
            )
        return tokens

    def _check_blocks(self, begins: np.ndarray, ends: np.ndarray) -> None:
        """Compares the checksums of the blocks with these bytes, once each. Raises DataError."""
        some = ends > begins
        if not self._unchecked.any() or not some.any():
            return
        first, last = begins[some] // BLOCK, (ends[some] - 1) // BLOCK
        low, count = int(first.min()), int(last.max()) - int(first.min()) + 1
        # How many of the spans begin up to a block, less those that ended before it.
        open_spans = np.bincount(first - low, minlength=count + 1) - np.bincount(last - low + 1, minlength=count + 1)
        touched = open_spans.cumsum()[:count] > 0
        for number in (np.flatnonzero(touched & self._unchecked[low : low + count]) + low).tolist():
            start, stop = number * BLOCK, min((number + 1) * BLOCK, self.footer.sums)
            if crc32(self._content.read(start, stop)) != self._sums[number]:
                raise DataError(f"{self.url}: damaged between the bytes {start} and {stop}; {MAKE}")
            self._unchecked[number] = False

    def count(self, *, tokens: float = math.inf, documents: float = math.inf) -> tuple[int, int]:
        """(tokens, documents) of the rows that are not excluded; counting ends where it reaches either."""
        counted = found = first = 0
        while first < self.footer.rows and counted < tokens and found < documents:
            rows = self.take(range(first, min(first + COUNTED, self.footer.rows)))
            lengths = rows.ends - rows.begins
            counted, found, first = counted + int(lengths.sum()), found + int((lengths > 0).sum()), first + len(rows)
        return counted, found

    def check(self) -> None:
        """Reads and hashes everything. Raises DataError when it is not what was written."""
        digest = hashlib.sha256()
        for part in self.parts():
            digest.update(part)
        if digest.hexdigest() != self.footer.sha256:
            raise DataError(f"{self.url}: damaged, it has another hash than when it was written; {MAKE}")

    def parts(self) -> Iterator[bytes | memoryview]:
        """All before the footer, in order."""
        for start in range(0, self.footer.start, READ):
            yield self._content.read(start, min(start + READ, self.footer.start))

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and the one after the last of these rows, int64 (rows,) each."""
        # Rows begin where those before them end.
        first, last = max(int(numbers.min()) - 1, 0), int(numbers.max()) + 1
        index = self.footer.index
        self._check_blocks(np.array([index + 8 * first]), np.array([index + 8 * last]))
        if self._ends is not None:
            known, first = self._ends, 0
        else:
            known = np.frombuffer(self._content.read(index + 8 * first, index + 8 * last), "<i8")
        ends = known[numbers - first].astype(np.int64)
        begins = known[np.maximum(numbers - 1, 0) - first].astype(np.int64)
        begins[numbers == 0] = 0
        return begins, ends


@dataclass(frozen=True)
class ShardRows:
    """Rows of a shard: the tokens begins..ends-1 of each, int64 (rows,)."""

    shard: TokenShard
    begins: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.begins)

    def parts(self, limit: int | None = PART) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, tokens, end of each row in them) of rows in order, up to `limit` tokens unless one has more."""
        ends = (self.ends - self.begins).cumsum()
        first = 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = len(ends)
            if limit is not None and ends[-1] - before > limit:
                last = max(first + 1, int(ends.searchsorted(before + limit, "right")))
            yield first, self.shard.join(self.begins[first:last], self.ends[first:last]), ends[first:last] - before
            first = last


class SharedShards:
    """The shards that the lanes of a process read, each opened once. Thread-safe."""

    def __init__(self, tokenizer: str, *, lanes: int, options: ReadOptions):
        self._tokenizer, self._options = tokenizer, options
        self._pages = PageCache(lanes)
        # Those of the next entries open while others are still in use.
        self._limit = 2 * lanes + 16
        self._open: OrderedDict[str, TokenShard] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, url: str) -> TokenShard:
        """The open shard. Raises DataError as `TokenShard` does."""
        with self._lock:
            shard = self._open.pop(url, None)
            if shard is None:
                shard = TokenShard(url, tokenizer=self._tokenizer, options=self._options, pages=self._pages)
            self._open[url] = shard
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return shard


def documents(files: list[str], tokenizer: str, *, options: ReadOptions) -> Iterator[np.ndarray]:
    """Tokens of the rows of the shards in base-name order, many documents at a time. Raises DataError."""
    for url in sorted(files, key=source_name):
        shard = TokenShard(url, tokenizer=tokenizer, options=options)
        for first in range(0, shard.footer.rows, 1024):
            for _, tokens, _ in shard.take(range(first, min(first + 1024, shard.footer.rows))).parts():
                yield tokens


def _open(url: str, options: ReadOptions, pages: PageCache | None) -> ShardContent:
    path = local_path(url)
    if path is not None:
        return MappedFile(path)
    return PagedFile(url, pages or PageCache(1), options=options)


def _mask(url: str, rows: int, options: ReadOptions) -> np.ndarray | None:
    """Bits of the rows, uint8 (ceil(rows / 8),); None without a mask."""
    bits = read_mask(url, options=options)
    if bits is None:
        return None
    if len(bits) != -(-rows // 8):
        raise DataError(f"{mask_url(url)}: {len(bits)} bytes, which does not fit the {rows} rows; {MAKE}")
    return np.frombuffer(bits, np.uint8)


def read_mask(url: str, *, options: ReadOptions) -> bytes | None:
    """Content of a shard's mask, None if it has none. Raises DataError when the store does not answer."""
    where = mask_url(url)
    path = local_path(where)
    if path is None:
        return PagedFile.whole(where, options=options)
    try:
        return read_small(Path(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable, or {MAKE}") from None
