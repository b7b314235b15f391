"""Documents of plain text files: the whole file is one, or each line that is not blank."""

from collections.abc import Iterator
from typing import Any

from stablelm.data.formats import text_lines
from stablelm.data.formats.bad_rows import BadRow, bad_bytes
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.stores import base_name

SUFFIXES = (".txt", ".txt.gz", ".txt.zst")


def is_plain_text(url: str) -> bool:
    """Whether a file is plain text, by its name."""
    return base_name(url).endswith(SUFFIXES)


def rows_from(url: str, row: int, options: ReadOptions, *, whole: bool) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of the first row given, rows from there on), at or before `row`.

    A row is (its line from 1, the text, or what is wrong with it); with `whole` the text is under
    `options.text_column` of a mapping. A file without text has no row. Raises DataError as `reader` does.
    """
    if options.text_unit == "line":
        first, lines = text_lines.rows_from(url, row, options)
        lines = ((number, line.removesuffix(b"\r")) for number, line in lines)
    else:
        first, lines = 0, _whole_file(url, options)
    return first, _rows(lines, url, options.text_column if whole else None)


def _whole_file(url: str, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    content = text_lines.content(url, options)
    if content and not content.isspace():
        yield 1, content


def _rows(lines: Iterator[tuple[int, bytes]], url: str, column: str | None) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        text = _decoded(line, url, number)
        yield number, text if column is None or isinstance(text, BadRow) else {column: text}


def _decoded(line: bytes, url: str, number: int) -> str | BadRow:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return bad_bytes(url, number + line.count(b"\n", 0, error.start), error)
