"""The user's own functions over rows: which are documents, and what their text is."""

from collections.abc import Iterator
from typing import Any

from stablelm.config.functions import function
from stablelm.data.options import ReadOptions
from stablelm.errors import DataError


def documents(
    records: Iterator[tuple[int, dict[str, Any]]], *, url: str, options: ReadOptions
) -> Iterator[tuple[int, str | None]]:
    """(number, text or None if it is left out) of each row: the filter sees it as stored, the map what is kept.

    Raises DataError naming `url` and the row when a function fails or there is no text under the column.
    """
    keep = function(options.filter) if options.filter is not None else None
    change = function(options.map) if options.map is not None else None
    for number, record in records:
        where = f"{url}, row {number}"
        if keep is not None and not _called(keep, record, f"{where}: data.filter={options.filter}"):
            yield number, None
            continue
        if change is not None:
            record = _called(change, record, f"{where}: data.map={options.map}")
        text = record.get(options.text_column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f"{where}: no text under {options.text_column!r}; let data.map put it there, let data.filter leave "
                "such rows out, or set data.text_column"
            )
        yield number, text


def _called(function: Any, record: dict[str, Any], what: str) -> Any:
    try:
        return function(record)
    # Whatever a user's function raises ends the run with the row's number.
    except Exception as error:
        raise DataError(f"{what} failed with {type(error).__name__}: {error}; mend it, then run again") from error
