"""Random access to remote files by pages that several readers share."""

import threading
from collections import OrderedDict

from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError
from stablelm.small_files import MOST

ROOM = 256 << 20  # bytes of pages a process keeps
SMALLEST, LARGEST = 64 << 10, 1 << 20  # bytes of a page: a request costs a round trip, and every lane keeps some


class Pages:
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


class RemoteFile:
    """Bytes of a file in any store. Raises DataError as `RangeFile` does. Thread-safe."""

    def __init__(self, url: str, pages: Pages, *, options: ReadOptions):
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
        """All bytes of a small file; None if there is no such file."""
        with RangeFile(url, options) as file:
            try:
                if file.stamp().size > MOST:
                    raise DataError(f"{url}: holds {file.stamp().size} bytes, more than any such file of ours")
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
    """Whether a store says that a file is not there, rather than that it cannot tell."""
    if error is None:
        return False
    if getattr(error, "status", None) == 404:
        return True
    if isinstance(error, FileNotFoundError):
        # fsspec says so of any failed first request, with the real reason as the cause.
        return error.__cause__ is None or _is_missing(error.__cause__)
    return False
