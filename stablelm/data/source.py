"""Where documents come from: rows of files, each a document or a JSON object that holds one."""

import threading
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import orjson

from stablelm.data import parquet, reader
from stablelm.data.options import ReadOptions
from stablelm.data.stores import base_name
from stablelm.errors import DataError

# A row of a file before it is parsed: number from 1 of its line or table row, what is there.
Row = tuple[int, bytes | None]
# Lines a process keeps for lanes that share a file and are behind the foremost of them, over all files.
HELD_BYTES = 512 << 20
# Rows read at once: a pass goes on beyond those that are kept.
TOGETHER = 256


def document_text(row: Row, *, url: str, column: str = "text") -> str:
    """The document in a row; `url` is for the message, `column` the key of the text.

    Raises DataError when the line is not JSON, not an object, or has no string under the key.
    """
    number, line = row
    if is_parquet(url):
        if line is None:
            raise DataError(f"{url}, row {number}: no value under {column!r}; drop such rows, or leave the file out")
        return line.decode()
    try:
        record = orjson.loads(line or b"")
    except orjson.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg})"
    else:
        text = record.get(column) if isinstance(record, dict) else None
        if isinstance(text, str):
            return text
        reason = f"without a string under {column!r}" if isinstance(record, dict) else "not a JSON object"
    raise DataError(
        f'{url}, line {number}: {reason}; make every line an object such as {{"{column}": "..."}}, '
        "or leave the file out"
    )


@lru_cache(4096)  # asked for every document
def is_parquet(url: str) -> bool:
    return base_name(url).endswith(".parquet")


def rows_from(url: str, row: int, options: ReadOptions) -> tuple[int, Iterator[Row]]:
    """(number of the first row given, rows from there on), at or before `row` and as near as a seek comes."""
    return parquet.rows_from(url, row, options) if is_parquet(url) else reader.rows_from(url, row, options)


def documents(files: list[str], options: ReadOptions) -> Iterator[str]:
    """Documents of the files in base-name order, each in file order. Raises DataError as its parts do."""
    for url in sorted(files, key=base_name):
        for row in rows_from(url, 0, options)[1]:
            yield document_text(row, url=url, column=options.text_column)


class FileRows:
    """Rows of one file by number, read forward once from the first asked for; thread-safe.

    The latest `room` bytes of them stay in memory. A file with an index, a table or plain text is entered
    near the first row, other files are read from their start.
    """

    def __init__(self, url: str, *, room: int, options: ReadOptions):
        self._url, self._options = url, options
        self._rows: Iterator[Row] | None = None
        self._room = room
        self._held: dict[int, Row] = {}  # rows low..high-1
        self._low = self._high = self._bytes = 0
        self._begun = self._ended = False
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def take(self, wanted: range) -> list[Row] | None:
        """The rows of these numbers (from 0) that the file has, in order.

        None when they are not kept any more, or so far ahead that others would lose theirs.
        """
        with self._lock:
            if self._rows is None:
                self._open(wanted)
            reach = self._high + len(wanted) * wanted.step if self._begun and not self._ended else wanted.start
            if not self._low <= wanted.start <= reach:
                return None
            while self._high <= wanted[-1] and not self._ended:
                self._read(min(wanted[-1] + 1 - self._high, TOGETHER), wanted.start)
            rows = [self._held[number] for number in wanted if number < self._high]
            self._forget(wanted.stop)
            return rows

    def _open(self, wanted: range) -> None:
        # Lanes that share a pass are about a block apart: those behind must find their rows as well.
        margin = 2 * len(wanted) * wanted.step if self._room else 0
        first, self._rows = rows_from(self._url, max(wanted.start - margin, 0), self._options)
        self._low = self._high = first

    def _read(self, count: int, needed: int) -> None:
        """The next rows, as many as `count` if there are; those from `needed` on are not forgotten."""
        assert self._rows is not None
        if self._error is not None:
            raise self._error
        rows: list[Row] = []
        try:
            self._begun = True
            rows.extend(islice(self._rows, count))
            self._ended = len(rows) < count
        except Exception as error:
            self._error = error  # the iterator is over now, which must not pass for the end of the file
        self._held.update(zip(range(self._high, self._high + len(rows)), rows, strict=True))
        self._high += len(rows)
        self._bytes += sum(len(line or b"") for _, line in rows)
        self._forget(needed)

    def _forget(self, below: int) -> None:
        while self._bytes > self._room and self._low < min(below, self._high):
            self._bytes -= len(self._held.pop(self._low)[1] or b"")
            self._low += 1


class SharedFiles:
    """Files that several lanes of a process read: they advance almost in step, so one pass serves them all.

    At most two passes over a file are kept: lanes enter the next epoch while others finish this one.
    """

    def __init__(self, files: int, *, options: ReadOptions):
        self._room = HELD_BYTES // files
        self._options = options
        self._passes: dict[str, list[FileRows]] = {}
        self._lock = threading.Lock()

    def take(self, url: str, wanted: range) -> list[Row] | None:
        """Like `FileRows.take`; None when no pass has these rows, so that the lane must read by itself."""
        with self._lock:
            passes = self._passes.setdefault(url, [])
            tries = list(passes)
        for rows in tries:
            found = rows.take(wanted)
            if found is not None:
                return found
        with self._lock:
            # Another lane may have begun the same pass in the meantime; one too many only costs time.
            if len(passes) > 1 and wanted.start >= wanted.step:
                return None
            rows = FileRows(url, room=self._room, options=self._options)
            passes[:] = [*passes[-1:], rows]
        return rows.take(wanted)
