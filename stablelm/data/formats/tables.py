"""Rows of tables: parquet files, read row group by row group, and files that need a builder of `datasets`.

A file of a data set is named by a URL that has all that opening it takes, so that any process can without asking the
hub for a list: `datasets+<builder>://<name>?file=<path or URL>&options=<of the builder>`. `name` stands for it in the
order of the text and is unique within the data set."""

import importlib
import io
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any
from urllib.parse import parse_qs, urlencode

from stablelm.data.formats.text_lines import BadRow, LengthLimit, bad_cell
from stablelm.data.storage.options import ReadOptions, local_path
from stablelm.data.storage.range_file import RangeFile
from stablelm.data.storage.retry import words
from stablelm.errors import DataError

# Rows decoded at once: a value that a dictionary holds once takes its whole length in each of them.
PARQUET_ROWS = 8
# Bytes that these may take in total, as estimated from the footer.
AT_ONCE = 256 << 20


def parquet_rows_from(
    url: str, row: int, options: ReadOptions, *, whole: bool = False
) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of the first row given, rows from there on), from the start of the row group that holds `row`.

    A row is (its number from 1, the text, or what is wrong where there is none), or with `whole` (its number, all
    columns by name). Raises DataError naming the file when it cannot be read, is not a parquet file or has no column
    of text named `options.text_column`; with `whole` only two columns of one name are an error.
    """
    file = RangeFile(url, options)
    table = _opened(file)
    check_columns(table.schema_arrow, file.url, None if whole else options.text_column)
    metadata = table.metadata
    starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
    group = max(bisect_right(starts, row) - 1, 0)
    column = None if whole else options.text_column
    bound = LengthLimit(url, options.max_document_bytes)
    return starts[min(group, len(starts) - 1)], _parquet_rows(file, table, group, starts, column, bound)


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


def _parquet_rows(
    file: RangeFile, table: Any, group: int, starts: list[int], column: str | None, bound: LengthLimit
) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = starts[min(group, len(starts) - 1)]
    columns = None if column is None else [column]
    try:
        for following in range(group, len(starts) - 1):
            rows = max(1, min(PARQUET_ROWS, AT_ONCE // max(table.metadata.row_group(following).total_byte_size, 1)))
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
    return DataError(f"{file.url}: damaged or not a parquet file ({words(error)}); replace it by an intact copy")


SCHEME = "datasets+"
PLAIN = "files"
"""Builder of shards that our own readers read: JSON lines and parquet."""
# Rows handed on at once.
DATASET_ROWS = 256

_opening = threading.Lock()  # builders patch their modules when they are made


@dataclass(frozen=True)
class DatasetFile:
    """`file`: path or URL; `options`: of the builder, `features` in the form of a data set's card."""

    builder: str
    name: str
    file: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        query = {"file": self.file} | ({"options": json.dumps(self.options)} if self.options else {})
        return f"{SCHEME}{self.builder}://{self.name}?{urlencode(query, safe='/:@')}"

    @classmethod
    def of(cls, url: str) -> "DatasetFile":
        """The shard that `url` describes."""
        head, _, query = url.partition("?")
        builder, _, name = head.removeprefix(SCHEME).partition("://")
        found = parse_qs(query)
        return cls(builder, name, found["file"][0], json.loads(found.get("options", ["{}"])[0]))


def is_dataset_file(url: str) -> bool:
    return url.startswith(SCHEME)


def stored_at(url: str) -> str:
    """Path or URL of the bytes of a file, which may be one of a data set."""
    return DatasetFile.of(url).file if is_dataset_file(url) else url


@lru_cache
def library() -> Any:
    """The package `datasets`, without progress bars and warnings: problems are raised as errors."""
    import datasets  # takes seconds: pandas and pyarrow come with it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def storage_options(options: ReadOptions) -> dict[str, dict[str, Any]]:
    """fsspec's options by store, as `datasets` takes them."""
    schemes = {name.partition(".")[0] for name in options.storage}
    return {scheme: options.settings(scheme) for scheme in schemes}


def dataset_rows(shard: DatasetFile, row: int, options: ReadOptions, column: str | None) -> Iterator[tuple[int, Any]]:
    """Rows of a file of a data set from row number `row` (from 0) on; earlier ones are read and dropped.

    A row is (its number from 1, the text under `column`, or what is wrong where there is none), or with None (its
    number, all columns by name). Raises DataError naming the file when it stays unreadable for `options.retry_budget`,
    is damaged, or has no column of text of that name.
    """
    number, ahead = row, row  # rows given, and those still to pass over
    for table in _tables(shard, column, options):
        if table.num_rows <= ahead:
            ahead -= table.num_rows
            continue
        table, ahead = table.slice(ahead), 0
        check_columns(table.schema, shard.file, column)
        if column is None:
            yield from records(table, shard.file, number)
        else:
            yield from cells(table.column(column), shard.file, column, number)
        number += table.num_rows


def _tables(shard: DatasetFile, column: str | None, options: ReadOptions) -> Iterator[Any]:
    """The rows of a shard as pyarrow tables, with this column alone where the form allows."""
    try:
        with _opening:
            stream = _builder(shard, options).as_streaming_dataset("train")
        if column is not None and stream.features is not None and column in stream.features:
            stream = stream.select_columns([column])
        yield from stream.with_format("arrow").iter(batch_size=DATASET_ROWS)
    except DataError:
        raise
    # Each builder has errors of its own.
    except Exception as error:
        raise DataError(
            f"{shard.file}: damaged, or not what the builder {shard.builder!r} reads ({words(error)}); "
            "replace it by an intact copy"
        ) from error


def _builder(shard: DatasetFile, options: ReadOptions) -> Any:
    """The builder of `datasets`, with this shard as its only file: made directly, so nothing is looked up for it."""
    datasets = library()
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.load import import_main_class

    from stablelm.data.formats import range_store

    file = shard.file if local_path(shard.file) is not None else range_store.address(shard.file)
    given = dict(shard.options)
    features = given.pop("features", None)
    module = f"datasets.packaged_modules.{shard.builder}.{shard.builder}"
    made = import_main_class(importlib.import_module(module).__name__)
    assert made is not None
    return made(
        cache_dir=f"{options.cache}/datasets" if options.cache else None,
        config_name="default",
        config_id="default",
        hash="shard",
        data_files=DataFilesDict({"train": DataFilesList([file], [])}),
        features=None if features is None else datasets.Features.from_dict(features),
        # The modules of builders remember those given last, so all are given the same.
        storage_options={range_store.PROTOCOL: {"options": options}},
        **given,
    )
