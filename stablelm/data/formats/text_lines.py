"""Lines of a file that may lie anywhere, from its start or from a row in the middle."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from stablelm.data.formats.inflate import Damaged, Starts, pieces
from stablelm.data.formats.seek_points import Index, Place
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.data.storage.stores import base_name, local_path
from stablelm.errors import DataError

__all__ = ["base_name", "content", "local_path", "numbered_lines", "open_lines", "rows_from"]

# A row of a file before it is parsed: line number from 1, line.
Row = tuple[int, bytes]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Bound:
    """The longest line of a file, and the most blank lines in a row, in bytes."""

    url: str
    most: int

    def check_line(self, length: int, number: int) -> None:
        """Raises DataError for a line of so many bytes, which may go on."""
        if length > self.most:
            raise DataError(
                f"{self.url}, line {number}: longer than data.max_document_bytes={self.most}; raise that if it is one "
                "document, or leave the file out"
            )

    def check_blanks(self, length: int, number: int) -> None:
        """Raises DataError for so many bytes of blank lines that end with this one."""
        if length > self.most:
            raise DataError(
                f"{self.url}, line {number}: {length} bytes of blank lines before it, more than "
                f"data.max_document_bytes={self.most}; replace the file by an intact copy, or leave it out"
            )


def open_lines(url: str, options: ReadOptions) -> Iterator[bytes]:
    """Lines of a file, without their newline and without blank ones; see `numbered_lines`."""
    return (line for _, line in numbered_lines(url, options))


def numbered_lines(url: str, options: ReadOptions) -> Iterator[Row]:
    """(line number from 1, line without newline) for each line that is not blank.

    `.gz` (any number of members) and `.zst` (any number of frames) are inflated, other names read as
    they are. A byte order mark at the start is dropped; the last line may lack its newline.
    Raises DataError naming the file: unreachable, truncated or damaged.
    """
    yield from rows_from(url, 0, options)[1]


def content(url: str, options: ReadOptions) -> bytes:
    """All of a file, inflated, without a byte order mark. Raises DataError as `numbered_lines` does."""
    bound, parts, total = Bound(url, options.max_document_bytes), [], 0
    with RangeFile(url, options) as file:
        for part in pieces(file, None, Starts(Index(None, url, file.stamp()))):
            parts.append(part)
            total += len(part)
            bound.check_line(total, 1)
    return b"".join(parts).removeprefix(BYTE_ORDER_MARK)


def rows_from(url: str, row: int, options: ReadOptions) -> tuple[int, Iterator[Row]]:
    """(number of the first row given, rows from there on): the last indexed row at or before `row`, else row 0."""
    file = RangeFile(url, options)
    bound = Bound(url, options.max_document_bytes)
    index = Index(options.cache, url, file.stamp())
    starts = Starts(index)
    place = index.before(row)
    if place is not None:
        chunks = _after(pieces(file, place, starts), place)
        if chunks is not None:
            return place.row, _closing(file, _split(chunks, starts, place.line, place.row, bound))
        index.drop()
        starts = Starts(index)
    return 0, _closing(file, _split(pieces(file, None, starts), starts, 0, 0, bound))


def _closing(file: RangeFile, runs: Iterator[list[Row]]) -> Iterator[Row]:
    def closing() -> Iterator[Iterator[Row]]:
        with file:
            for rows in runs:
                # Each row is let go when it is taken: hundreds of lanes hold one such run each.
                waiting = [None, *reversed(rows)]
                rows.clear()
                yield iter(waiting.pop, None)

    return chain.from_iterable(closing())


def _after(chunks: Iterator[bytes], place: Place) -> Iterator[bytes] | None:
    """The text from the place's row on; None when there is not what the index says."""
    left = place.skip
    try:
        for chunk in chunks:
            if len(chunk) >= left:
                return chain([chunk[left:]], chunks) if chunk[left - 1 : left] == b"\n" else None
            left -= len(chunk)
    except Damaged:
        return None
    return None


def _split(chunks: Iterator[bytes], starts: Starts, number: int, row: int, bound: Bound) -> Iterator[list[Row]]:
    """Lines of the chunks, those that end in one together; `number` lines and `row` rows came before them."""
    carry: list[bytes] = []
    held = blanks = 0  # bytes of the line that goes on, and since the last row
    for chunk in chunks:
        lines = chunk.split(b"\n")
        begun = len(lines[0]) + 1
        carry.append(lines[0])
        held += len(lines[0])
        bound.check_line(held, number + 1)
        if len(lines) == 1:
            starts.passed(len(chunk), None, row, number)
            continue
        lines[0] = b"".join(carry)
        carry = [lines.pop()]
        held = len(carry[0])
        if len(chunk) > bound.most:
            length, at = max((len(line), at) for at, line in enumerate([*lines, carry[0]], number + 1))
            bound.check_line(length, at)
        if number == 0:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        rows = [(at, line) for at, line in enumerate(lines, number + 1) if line and not line.isspace()]
        starts.passed(len(chunk), begun, row + (bool(rows) and rows[0][0] == number + 1), number + 1)
        number += len(lines)
        row += len(rows)
        blanks = 0 if rows else blanks + len(chunk) - held
        bound.check_blanks(blanks, number)
        del lines
        yield rows
    line = b"".join(carry)
    line = line if number else line.removeprefix(BYTE_ORDER_MARK)
    if line and not line.isspace():
        yield [(number + 1, line)]
