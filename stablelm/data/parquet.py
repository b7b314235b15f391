"""Rows of a parquet file: its text column, read row group by row group through byte ranges."""

import io
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from stablelm.data.options import ReadOptions
from stablelm.data.rangefile import RangeFile
from stablelm.data.reader import Bound
from stablelm.data.retry import words
from stablelm.errors import DataError

# Rows decoded at once: a value that a dictionary holds once takes its whole length in each of them.
ROWS = 8
# Bytes that these may take together, as far as the footer tells.
AT_ONCE = 256 << 20


def rows_from(
    url: str, row: int, options: ReadOptions, *, whole: bool = False
) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of the first row given, rows from there on), from the start of the row group that holds `row`.

    A row is (its number from 1, the text), or with `whole` (its number, all columns by name). Raises DataError
    naming the file when it cannot be read, is no parquet file or has no column of text named
    `options.text_column`, and where that has no value; with `whole` nothing is asked of the columns.
    """
    file = RangeFile(url, options)
    table = _opened(file) if whole else _table(file, options)
    metadata = table.metadata
    starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
    group = max(bisect_right(starts, row) - 1, 0)
    column = None if whole else options.text_column
    bound = Bound(url, options.max_document_bytes)
    return starts[min(group, len(starts) - 1)], _rows(file, table, group, starts, column, bound)


def row_count(url: str, options: ReadOptions) -> int:
    """Rows of the table, by its footer alone."""
    with RangeFile(url, options) as file:
        return _opened(file).metadata.num_rows


def _opened(file: RangeFile) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    buffered = io.BufferedReader(file, buffer_size=file.block)
    try:
        return parquet.ParquetFile(buffered, pre_buffer=False, buffer_size=file.block)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _table(file: RangeFile, options: ReadOptions) -> Any:
    import pyarrow

    table, column = _opened(file), options.text_column
    schema = table.schema_arrow
    if column not in schema.names:
        names = ", ".join(map(repr, schema.names[:20]))
        raise DataError(f"{file.url}: has no column {column!r} but {names}; set data.text_column to the one with text")
    kind = schema.field(column).type
    if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
        raise DataError(f"{file.url}: column {column!r} holds {kind}, not text; set data.text_column to another one")
    return table


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
                for value in batch.to_pylist() if column is None else batch.column(0).to_pylist():
                    number += 1
                    if value is None:
                        raise no_value(file.url, number, column)
                    if column is not None:
                        bound.check_line(len(value), number)
                    yield number, value
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    finally:
        table.close()
        file.close()


def no_value(url: str, number: int, column: str | None) -> DataError:
    """What is raised for row `number` (from 1) of a table that has no text."""
    return DataError(f"{url}, row {number}: no value under {column!r}; drop such rows, or leave the file out")


def _damaged(file: RangeFile, error: Exception) -> DataError:
    file.forget()
    return DataError(f"{file.url}: damaged or no parquet file ({words(error)}); replace it by an intact copy")
