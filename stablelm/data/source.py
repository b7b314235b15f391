"""Where documents come from: files with one JSON object a line, its `text` the document."""

import threading
from collections.abc import Iterator

import orjson

from stablelm.data.reader import base_name, numbered_lines
from stablelm.errors import DataError

# A row of a file before it is parsed: line number from 1, line.
Row = tuple[int, bytes]
# Lines a process keeps for lanes that share a file and are behind the foremost of them, over all files.
HELD_BYTES = 512 << 20


def document_text(line: bytes, *, url: str, number: int) -> str:
    """The document in a line; `url` and `number` (from 1) are for the message.

    Raises DataError when the line is not JSON, not an object, or its `text` is not a string.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg})"
    else:
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            return text
        reason = "without a string under 'text'" if isinstance(record, dict) else "not a JSON object"
    raise DataError(
        f'{url}, line {number}: {reason}; make every line an object such as {{"text": "..."}}, or leave the file out'
    )


def documents(files: list[str], *, retry_budget: float) -> Iterator[str]:
    """Documents of the files in base-name order, each in file order. Raises DataError as its parts do."""
    for url in sorted(files, key=base_name):
        for number, line in numbered_lines(url, retry_budget=retry_budget):
            yield document_text(line, url=url, number=number)


class FileRows:
    """Rows of one file by number, read forward once; the latest `room` bytes of them stay in memory. Thread-safe."""

    def __init__(self, url: str, *, room: int, retry_budget: float):
        self._lines = numbered_lines(url, retry_budget=retry_budget)
        self._room = room
        self._held: dict[int, Row] = {}  # rows low..high-1
        self._low = self._high = self._bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def take(self, wanted: range) -> list[Row] | None:
        """The rows of these numbers (from 0) that the file has, in order.

        None when they are not kept any more, or so far ahead that others would lose theirs.
        """
        with self._lock:
            reach = self._high + len(wanted) * wanted.step if self._high and not self._ended else wanted.start
            if not self._low <= wanted.start <= reach:
                return None
            while self._high <= wanted[-1] and not self._ended:
                self._read_row(wanted.start)
            rows = [self._held[number] for number in wanted if number < self._high]
            self._forget(wanted.stop)
            return rows

    def _read_row(self, needed: int) -> None:
        if self._error is not None:
            raise self._error
        try:
            row = next(self._lines, None)
        except Exception as error:
            self._error = error  # the iterator is over now, which must not pass for the end of the file
            raise
        if row is None:
            self._ended = True
            return
        self._held[self._high] = row
        self._high += 1
        self._bytes += len(row[1])
        self._forget(needed)

    def _forget(self, below: int) -> None:
        while self._bytes > self._room and self._low < min(below, self._high):
            self._bytes -= len(self._held.pop(self._low)[1])
            self._low += 1


class SharedFiles:
    """Files that several lanes of a process read: they advance almost in step, so one pass serves them all.

    At most two passes over a file are kept: lanes enter the next epoch while others finish this one.
    """

    def __init__(self, files: int, *, retry_budget: float):
        self._room = HELD_BYTES // files
        self._retry_budget = retry_budget
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
            rows = FileRows(url, room=self._room, retry_budget=self._retry_budget)
            passes[:] = [*passes[-1:], rows]
        return rows.take(wanted)
