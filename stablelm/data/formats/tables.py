"""Rows of a parquet file: its text column, read row group by row group through byte ranges."""

import io
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from stablelm.data.formats.bad_rows import BadRow, bad_cell
from stablelm.data.formats.text_lines import Bound
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.data.storage.retry import words
from stablelm.errors import DataError

# Rows decoded at once: a value that a dictionary holds once takes its whole length in each of them.
ROWS = 8
# Bytes that these may take together, as far as the footer tells.
AT_ONCE = 256 << 20


def rows_from(
    url: str, row: int, options: ReadOptions, *, whole: bool = False
) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of the first row given, rows from there on), from the start of the row group that holds `row`.

    A row is (its number from 1, the text, or what is wrong where there is none), or with `whole` (its number, all
    columns by name). Raises DataError naming the file when it cannot be read, is no parquet file or has no column
    of text named `options.text_column`; with `whole` two columns must only not have one name.
    """
    file = RangeFile(url, options)
    table = _opened(file)
    check_columns(table.schema_arrow, file.url, None if whole else options.text_column)
    metadata = table.metadata
    starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
    group = max(bisect_right(starts, row) - 1, 0)
    column = None if whole else options.text_column
    bound = Bound(url, options.max_document_bytes)
    return starts[min(group, len(starts) - 1)], _rows(file, table, group, starts, column, bound)


def _opened(file: RangeFile) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    buffered = io.BufferedReader(file, buffer_size=file.block)
    try:
        return parquet.ParquetFile(buffered, pre_buffer=False, buffer_size=file.block)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def check_columns(schema: Any, url: str, column: str | None) -> None:
    """A column of this name holds text, or (None) no two have one name. Raises DataError naming `url`."""
    names = schema.names
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1 and column in (None, name)]
    if twice:
        raise DataError(f"{url}: has {names.count(twice[0])} columns named {twice[0]!r}; rename all but one of them")
    if column is None:
        return
    if column not in names:
        shown = ", ".join(map(repr, names[:20]))
        raise DataError(f"{url}: has no column {column!r} but {shown}; set data.text_column to the one with text")
    kind = schema.field(column).type
    if not _is_text(kind):
        raise DataError(
            f"{url}: column {column!r} holds {kind}, not text; set data.text_column to another one, or let data.map "
            "make text of it"
        )


def _is_text(kind: Any) -> bool:
    """Strings, also as a dictionary of them, which is how categories are stored; a column of nulls alone may be any."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def cells(column: Any, url: str, name: str, before: int) -> Iterator[tuple[int, str | BadRow]]:
    """(number, text or what is wrong) of each row of a column of text, after so many rows before it."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_cell(value) for value in column]
    for number, value in enumerate(values, before + 1):
        yield number, value if isinstance(value, str) else bad_cell(url, number, name, value)


def records(table: Any, url: str, before: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(number, all columns by name, or what is wrong) of each row of a table, after so many rows before it."""
    try:
        values = table.to_pylist()
    except UnicodeDecodeError:
        values = [_cell(table.slice(row, 1).to_struct_array()[0]) for row in range(table.num_rows)]
    for number, value in enumerate(values, before + 1):
        yield number, value if isinstance(value, dict) else bad_cell(url, number, "a column", value)


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _rows(
    file: RangeFile, table: Any, group: int, starts: list[int], column: str | None, bound: Bound
) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = starts[min(group, len(starts) - 1)]
    columns = None if column is None else [column]
    try:
        for following in range(group, len(starts) - 1):
            rows = max(1, min(ROWS, AT_ONCE // max(table.metadata.row_group(following).total_byte_size, 1)))
            for batch in table.iter_batches(rows, row_groups=[following], columns=columns, use_threads=False):
                if column is None:
                    yield from records(batch, file.url, number)
                else:
                    for row, text in cells(batch.column(0), file.url, column, number):
                        if isinstance(text, str):
                            bound.check_line(len(text), row)
                        yield row, text
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    finally:
        table.close()
        file.close()


def _damaged(file: RangeFile, error: Exception) -> DataError:
    file.forget()
    return DataError(f"{file.url}: damaged or no parquet file ({words(error)}); replace it by an intact copy")
