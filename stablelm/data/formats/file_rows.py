"""Rows of files in any format, each a document or an object that contains one; the user's functions over them."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from stablelm import quick_json
from stablelm.data.formats import tables, text_lines
from stablelm.data.formats.text_lines import FIX, PLAIN_SUFFIXES, BadRow, bad_line, is_plain_text, not_unicode
from stablelm.data.storage.options import ReadOptions, base_name
from stablelm.errors import DataError
from stablelm.import_path import function

# A row of a file: number from 1 of its line or table row, and what is there: a line of JSON, a document, None where
# data.filter leaves the row out, or what is wrong with it.
FileRow = tuple[int, bytes | str | BadRow | None]
# From the number of rows that there are to the places of those that are wanted.
Pick = Callable[[int], Sequence[int] | np.ndarray]
# Names of the files that are read.
SUFFIXES = (".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".json", ".jsonl", ".parquet", *PLAIN_SUFFIXES)
SUFFIXES_IN_WORDS = f"{', '.join('*' + suffix for suffix in SUFFIXES[:-1])} or *{SUFFIXES[-1]}"
# Lines a process keeps for lanes that share a file and are behind the foremost of them, over all files.
HELD_BYTES = 512 << 20
# Rows read at once: a pass goes on beyond those that are kept.
ROWS_READ_AT_ONCE = 256


def document_text(row: FileRow, *, url: str, column: str = "text") -> str | None:
    """The document in a row, None if it is excluded; `url` is for the message, `column` the key of the text.

    Raises BadRow when the line is not JSON, not an object, or has no string of Unicode text under the key.
    """
    number, content = row
    if not isinstance(content, bytes):
        if isinstance(content, BadRow):
            raise content
        return content
    try:
        text = quick_json.loads(content)[column]
        if type(text) is str:
            return text
    except (quick_json.JSONDecodeError, TypeError, KeyError):
        pass
    return _text_of(record_of(number, content, url, column), number, url, column)


def record_of(number: int, line: bytes, url: str, column: str = "text") -> dict[str, Any]:
    """The object in a line of JSON, or of what Python's json module accepts: NaN and lone surrogates.

    Bytes that are not UTF-8 become lone surrogates, so that only a document that contains one is wrong. Raises BadRow.
    """
    try:
        record = quick_json.loads(line)
    except quick_json.JSONDecodeError as error:
        try:
            record = json.loads(line.decode("utf-8", "surrogateescape"), strict=False)
        except (ValueError, RecursionError):
            raise _bad_line(url, number, f"not valid JSON ({error.msg})", column) from None
    if not isinstance(record, dict):
        raise _bad_line(url, number, "not a JSON object", column)
    return record


def _text_of(record: dict[str, Any], number: int, url: str, column: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        raise _bad_line(url, number, f"without a string under {column!r}", column)
    if wrong := not_unicode(text):
        raise _bad_line(url, number, f"{wrong} under {column!r}", column)
    return text


def _bad_line(url: str, number: int, reason: str, column: str) -> BadRow:
    return bad_line(tables.stored_at(url), number, reason, column)


def is_parquet(url: str) -> bool:
    return base_name(url).endswith(".parquet")


def rows_from(url: str, row: int, options: ReadOptions) -> tuple[int, Iterator[FileRow]]:
    """(number of the first row given, rows from there on), at or before `row` and as near as a seek comes."""
    if options.filter is None and options.map is None:
        return stored_rows(url, row, options)
    first, stored = stored_rows(url, row, options, whole=True)
    # The user's functions see no row before the one requested.
    return row, _transformed(islice(stored, row - first, None), url=url, options=options)


def stored_rows(url: str, row: int, options: ReadOptions, *, whole: bool = False) -> tuple[int, Iterator[Any]]:
    """Like `rows_from` without the user's functions; of tables the rows are whole records if that is wanted."""
    if shard := _foreign(url):
        return row, tables.dataset_rows(shard, row, options, None if whole else options.text_column)
    url = tables.stored_at(url)
    if is_parquet(url):
        return tables.parquet_rows_from(url, row, options, whole=whole)
    if is_plain_text(url):
        return text_lines.plain_text_from(url, row, options, whole=whole)
    return text_lines.lines_from(url, row, options)


def _foreign(url: str) -> tables.DatasetFile | None:
    """What `datasets` must read; None for what our own readers do."""
    shard = tables.DatasetFile.of(url) if tables.is_dataset_file(url) else None
    return shard if shard is not None and shard.builder != tables.PLAIN else None


def texts(url: str, options: ReadOptions, skipped: Callable[[BadRow], None] = lambda row: None) -> Iterator[str | None]:
    """What each row of a file holds, in file order: its document, or None where that is excluded or skipped.

    Raises DataError as its parts do; BadRow for a bad row, unless `options.bad_rows` says to skip it, which is
    then passed to `skipped`.
    """
    for row in rows_from(url, 0, options)[1]:
        try:
            yield document_text(row, url=url, column=options.text_column)
        except BadRow as error:
            if options.bad_rows != "skip":
                raise
            skipped(error)
            yield None


def documents(files: list[str], options: ReadOptions) -> Iterator[str]:
    """Documents of the files in base-name order, each in file order; rows without text are passed over.

    Raises DataError as `texts` does.
    """
    for url in sorted(files, key=base_name):
        yield from filter(None, texts(url, options))


class FileRows:
    """Rows of one file by number, read forward once from the first that is requested; thread-safe.

    The latest `room` bytes of them stay in memory. A file with an index, a table or plain text is entered
    near the first row, other files are read from their start.
    """

    def __init__(self, url: str, *, room: int, options: ReadOptions):
        self._url, self._options = url, options
        self._rows: Iterator[FileRow] | None = None
        self._room = room
        self._held: dict[int, FileRow] = {}  # rows low..high-1
        self._low = self._high = self._bytes = 0
        self._begun = self._ended = False
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def take(self, wanted: range, pick: Pick | None = None) -> list[FileRow] | None:
        """The rows of these numbers (from 0) that the file has, in order; with `pick` those that it picks of them.

        None when they are no longer kept, or so far ahead that other lanes would lose theirs.
        """
        with self._lock:
            if self._rows is None:
                self._open(wanted)
            reach = self._high + len(wanted) * wanted.step if self._begun and not self._ended else wanted.start
            if not self._low <= wanted.start <= reach:
                return None
            while self._high <= wanted[-1] and not self._ended:
                self._read(min(wanted[-1] + 1 - self._high, ROWS_READ_AT_ONCE), wanted.start)
            found = wanted[: len(range(wanted.start, min(wanted.stop, self._high), wanted.step))]
            rows = [self._held[found[place]] for place in (range(len(found)) if pick is None else pick(len(found)))]
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
        rows: list[FileRow] = []
        try:
            self._begun = True
            rows.extend(islice(self._rows, count))
            self._ended = len(rows) < count
        except Exception as error:
            self._error = error  # the iterator is over now, which must not pass for the end of the file
        self._held.update(zip(range(self._high, self._high + len(rows)), rows, strict=True))
        self._high += len(rows)
        self._bytes += sum(map(_size, rows))
        self._forget(needed)

    def _forget(self, below: int) -> None:
        while self._bytes > self._room and self._low < min(below, self._high):
            self._bytes -= _size(self._held.pop(self._low))
            self._low += 1


def _size(row: FileRow) -> int:
    content = row[1]
    return len(content) if isinstance(content, bytes | str) else 0


class SharedFiles:
    """Files that several lanes of a process read: they advance at almost the same pace, so one pass serves them all.

    At most two passes over a file are kept: lanes enter the next epoch while others finish this one.
    """

    def __init__(self, files: int, *, options: ReadOptions):
        self._room = HELD_BYTES // files
        self._options = options
        self._passes: dict[str, list[FileRows]] = {}
        self._lock = threading.Lock()

    def take(self, url: str, wanted: range, pick: Pick | None = None) -> list[FileRow] | None:
        """Like `FileRows.take`; None when no pass has these rows, so that the lane must read by itself."""
        with self._lock:
            passes = self._passes.setdefault(url, [])
            tries = list(passes)
        for rows in tries:
            found = rows.take(wanted, pick)
            if found is not None:
                return found
        with self._lock:
            # Another lane may have begun the same pass in the meantime; one too many only costs time.
            if len(passes) > 1 and wanted.start >= wanted.step:
                return None
            rows = FileRows(url, room=self._room, options=self._options)
            passes[:] = [*passes[-1:], rows]
        return rows.take(wanted, pick)


def _transformed(
    rows: Iterator[tuple[int, bytes | dict[str, Any] | BadRow]], *, url: str, options: ReadOptions
) -> Iterator[tuple[int, str | BadRow | None]]:
    """(number, text or None if it is excluded) of each row: the filter sees it as stored, the map what is kept.

    In place of the text is what is wrong with a row that could not be read, or has no text under the column.
    Raises DataError naming `url` and the row when a function fails.
    """
    keep = function(options.filter) if options.filter is not None else None
    change = function(options.map) if options.map is not None else None
    for number, stored in rows:
        try:
            record = record_of(number, stored, url) if isinstance(stored, bytes) else stored
        except BadRow as error:
            record = error
        if isinstance(record, BadRow):
            yield number, record
            continue
        where = f"{url}, row {number}"
        if keep is not None and not _called(keep, record, f"{where}: data.filter={options.filter}"):
            yield number, None
            continue
        if change is not None:
            record = _called(change, record, f"{where}: data.map={options.map}")
        text = record.get(options.text_column) if isinstance(record, dict) else None
        wrong = not_unicode(text) if isinstance(text, str) else "no text"
        if wrong:
            yield (
                number,
                BadRow(
                    f"{where}: {wrong} under {options.text_column!r}; let data.map put text there, let data.filter "
                    f"leave such rows out, set data.text_column, {FIX}"
                ),
            )
        else:
            yield number, text


def _called(function: Any, record: dict[str, Any], what: str) -> Any:
    try:
        return function(record)
    # Whatever a user's function raises ends the run with the row's number.
    except Exception as error:
        raise DataError(f"{what} failed with {type(error).__name__}: {error}; fix it, then run again") from error
