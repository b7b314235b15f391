"""The user's own functions over rows: which are documents, and what their text is."""

from collections.abc import Iterator
from typing import Any

from stablelm.config.functions import function
from stablelm.data.formats.bad_rows import FIX, BadRow, not_unicode
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError


def documents(
    records: Iterator[tuple[int, dict[str, Any] | BadRow]], *, url: str, options: ReadOptions
) -> Iterator[tuple[int, str | BadRow | None]]:
    """(number, text or None if it is left out) of each row: the filter sees it as stored, the map what is kept.

    In place of the text is what is wrong with a row that could not be read, or has no text under the column.
    Raises DataError naming `url` and the row when a function fails.
    """
    keep = function(options.filter) if options.filter is not None else None
    change = function(options.map) if options.map is not None else None
    for number, record in records:
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
