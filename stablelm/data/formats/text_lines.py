"""Lines of text files, from the start or from a row in the middle, and what can be wrong with a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stablelm.data.formats.inflate import Damaged, SeekPointFinder, pieces
from stablelm.data.formats.seek_points import SeekIndex, SeekPoint
from stablelm.data.storage.options import ReadOptions, base_name
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError

FIX = "or set data.bad_rows=skip to leave such rows out"


class BadRow(DataError):
    """A row that holds no document: cut off, not Unicode, null, or without the key."""


def bad_line(url: str, number: int, reason: str, column: str) -> BadRow:
    """Of line `number` (from 1) of a file of JSON lines."""
    return BadRow(f'{url}, line {number}: {reason}; make every line an object such as {{"{column}": "..."}}, {FIX}')


def bad_cell(url: str, number: int, column: str, value: Any = None) -> BadRow:
    """Of row `number` (from 1) of a table, with this value under `column`: None or what its bytes raised."""
    reason = "no value" if value is None else f"bytes that are not UTF-8 ({value.reason})"
    return BadRow(f"{url}, row {number}: {reason} under {column!r}; drop or repair such rows, {FIX}")


def bad_bytes(url: str, number: int, error: UnicodeDecodeError) -> BadRow:
    """Of plain text that line `number` (from 1) makes unreadable."""
    byte = error.object[error.start]
    return BadRow(f"{url}, line {number}: the byte 0x{byte:02x} is not UTF-8 ({error.reason}); convert the file, {FIX}")


def not_unicode(text: str) -> str | None:
    """Why a string is not valid Unicode: an undecodable byte or a lone surrogate; None if it is valid."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # `surrogateescape` gives bytes these codes, which are lone surrogates as well.
        byte = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8, or " if 0xDC80 <= code <= 0xDCFF else ""
        return f"{byte}a lone surrogate (\\u{code:04x})"
    return None


# A row of a file before it is parsed: line number from 1, line.
TextLine = tuple[int, bytes]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LengthLimit:
    """The limit on the length of a line, and of blank lines in a row, in bytes."""

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


def content(url: str, options: ReadOptions) -> bytes:
    """All of a file, inflated, without a byte order mark. Raises DataError as `lines_from` does."""
    bound, parts, total = LengthLimit(url, options.max_document_bytes), [], 0
    with RangeFile(url, options) as file:
        for part in pieces(file, None, SeekPointFinder(SeekIndex(None, url, file.stamp()))):
            parts.append(part)
            total += len(part)
            bound.check_line(total, 1)
    return b"".join(parts).removeprefix(BYTE_ORDER_MARK)


def lines_from(url: str, row: int, options: ReadOptions) -> tuple[int, Iterator[TextLine]]:
    """(number of the first row given, rows from there on): the last indexed row at or before `row`, else row 0.

    A row is (line number from 1, line without newline); blank lines are none. `.gz` (any number of members) and `.zst`
    (any number of frames) are inflated, other names read as they are. A byte order mark at the start is dropped; the
    last line may lack its newline. Raises DataError naming the file: unreachable, truncated or damaged.
    """
    file = RangeFile(url, options)
    bound = LengthLimit(url, options.max_document_bytes)
    index = SeekIndex(options.cache, url, file.stamp())
    starts = SeekPointFinder(index)
    place = index.before(row)
    if place is not None:
        chunks = _after(pieces(file, place, starts), place)
        if chunks is not None:
            return place.row, _closing(file, _split(chunks, starts, place.line, place.row, bound))
        index.drop()
        starts = SeekPointFinder(index)
    return 0, _closing(file, _split(pieces(file, None, starts), starts, 0, 0, bound))


def _closing(file: RangeFile, runs: Iterator[list[TextLine]]) -> Iterator[TextLine]:
    def closing() -> Iterator[Iterator[TextLine]]:
        with file:
            for rows in runs:
                # Each row is let go when it is taken: hundreds of lanes hold one such run each.
                waiting = [None, *reversed(rows)]
                rows.clear()
                yield iter(waiting.pop, None)

    return chain.from_iterable(closing())


def _after(chunks: Iterator[bytes], place: SeekPoint) -> Iterator[bytes] | None:
    """The text from the seek point's row on; None where the file does not match the index."""
    ahead = place.skip
    try:
        for chunk in chunks:
            if len(chunk) >= ahead:
                return chain([chunk[ahead:]], chunks) if chunk[ahead - 1 : ahead] == b"\n" else None
            ahead -= len(chunk)
    except Damaged:
        return None
    return None


def _split(
    chunks: Iterator[bytes], starts: SeekPointFinder, number: int, row: int, bound: LengthLimit
) -> Iterator[list[TextLine]]:
    """Lines of the chunks, those that end in one chunk in one list; `number` lines and `row` rows came before them."""
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


PLAIN_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")


def is_plain_text(url: str) -> bool:
    """Whether a file is plain text, by its name."""
    return base_name(url).endswith(PLAIN_SUFFIXES)


def plain_text_from(url: str, row: int, options: ReadOptions, *, whole: bool) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of the first row given, rows from there on), at or before `row`.

    A row is (its line from 1, the text, or what is wrong with it); with `whole` the text is under
    `options.text_column` of a mapping. A file without text has no row. Raises DataError as `lines_from` does.
    """
    if options.text_unit == "line":
        first, lines = lines_from(url, row, options)
        lines = ((number, line.removesuffix(b"\r")) for number, line in lines)
    else:
        first, lines = 0, _whole_file(url, options)
    return first, _plain_rows(lines, url, options.text_column if whole else None)


def _whole_file(url: str, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    text = content(url, options)
    if text and not text.isspace():
        yield 1, text


def _plain_rows(lines: Iterator[tuple[int, bytes]], url: str, column: str | None) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        text = _decoded(line, url, number)
        yield number, text if column is None or isinstance(text, BadRow) else {column: text}


def _decoded(line: bytes, url: str, number: int) -> str | BadRow:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return bad_bytes(url, number + line.count(b"\n", 0, error.start), error)
