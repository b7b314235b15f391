"""Where documents come from: rows of files, each a document or a JSON object that holds one."""

import threading
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import orjson

from stablelm.data import dataset_rows, parquet, reader, transform
from stablelm.data.options import ReadOptions
from stablelm.data.stores import base_name
from stablelm.errors import DataError

# A row of a file: number from 1 of its line or table row, and what is there: a line of JSON, a document, or None
# where data.filter leaves the row out.
Row = tuple[int, bytes | str | None]
# Lines a process keeps for lanes that share a file and are behind the foremost of them, over all files.
HELD_BYTES = 512 << 20
# Rows read at once: a pass goes on beyond those that are kept.
TOGETHER = 256


def document_text(row: Row, *, url: str, column: str = "text") -> str | None:
    """The document in a row, None if it is left out; `url` is for the message, `column` the key of the text.

    Raises DataError when the line is not JSON, not an object, or has no string under the key.
    """
    number, content = row
    if not isinstance(content, bytes):
        return content
    text = _record(number, content, url, column).get(column)
    if isinstance(text, str):
        return text
    raise _no_document(number, f"without a string under {column!r}", url, column)


def _record(number: int, line: bytes, url: str, column: str) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _no_document(number, f"not valid JSON ({error.msg})", url, column) from None
    if not isinstance(record, dict):
        raise _no_document(number, "not a JSON object", url, column)
    return record


def _no_document(number: int, reason: str, url: str, column: str) -> DataError:
    where = f"{dataset_rows.stored_at(url)}, line {number}"
    return DataError(
        f'{where}: {reason}; make every line an object such as {{"{column}": "..."}}, or leave the file out'
    )


@lru_cache(4096)  # asked for every document
def is_parquet(url: str) -> bool:
    return base_name(url).endswith(".parquet")


def rows_from(url: str, row: int, options: ReadOptions) -> tuple[int, Iterator[Row]]:
    """(number of the first row given, rows from there on), at or before `row` and as near as a seek comes."""
    if options.filter is None and options.map is None:
        return stored_rows(url, row, options)
    first, stored = stored_rows(url, row, options, whole=True)
    records = (
        (number, _record(number, content, url, options.text_column) if isinstance(content, bytes) else content)
        for number, content in islice(stored, row - first, None)
    )
    # The user's functions see no row before the one asked for.
    return row, transform.documents(records, url=url, options=options)


def stored_rows(url: str, row: int, options: ReadOptions, *, whole: bool = False) -> tuple[int, Iterator[Any]]:
    """Like `rows_from` without the user's functions; of tables the rows are whole records if that is wanted."""
    if shard := _foreign(url):
        return dataset_rows.rows_from(shard, row, options, whole=whole)
    url = dataset_rows.stored_at(url)
    if is_parquet(url):
        return parquet.rows_from(url, row, options, whole=whole)
    return reader.rows_from(url, row, options)


def row_count(url: str, options: ReadOptions, limit: int) -> int:
    """Rows of a file, at most `limit` of them read; of parquet the footer tells them. Raises DataError."""
    if is_parquet(url) and not _foreign(url):
        return parquet.row_count(dataset_rows.stored_at(url), options)
    return sum(1 for _ in islice(stored_rows(url, 0, options, whole=True)[1], limit))


def _foreign(url: str) -> dataset_rows.Shard | None:
    """What `datasets` must read; None for what our own readers do."""
    shard = dataset_rows.Shard.of(url) if dataset_rows.is_shard(url) else None
    return shard if shard is not None and shard.builder != dataset_rows.PLAIN else None


def documents(files: list[str], options: ReadOptions) -> Iterator[str]:
    """Documents of the files in base-name order, each in file order; those left out are skipped.

    Raises DataError as its parts do.
    """
    for url in sorted(files, key=base_name):
        for row in rows_from(url, 0, options)[1]:
            text = document_text(row, url=url, column=options.text_column)
            if text is not None:
                yield text


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
