"""What can be wrong with one row of a file, in words; `data.bad_rows` says whether such a row ends the run."""

from typing import Any

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
    """What is wrong with a string that is no Unicode text: a byte or half a pair that no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # `surrogateescape` gives bytes these codes, which are halves of pairs as well.
        byte = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8, or " if 0xDC80 <= code <= 0xDCFF else ""
        return f"{byte}half a surrogate pair (\\u{code:04x})"
    return None
