"""Rows of one shard of a data set, read by the builder of `datasets` that its form needs.

A shard is one of the data set's files. All that it takes to open it is in its URL, so that any process can
without asking the hub for a list: `datasets+<builder>://<name>?file=<where it lies>&options=<of the builder>`.
`name` stands for it in the order of the text and is unique within the data set.
"""

import importlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, urlencode

from stablelm.data.formats.tables import cells, check_columns, records
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.retry import words
from stablelm.data.storage.stores import local_path
from stablelm.errors import DataError

SCHEME = "datasets+"
PLAIN = "files"
"""Builder of shards that our own readers read: JSON lines and parquet."""
# Rows handed on at once.
ROWS = 256

_opening = threading.Lock()  # builders patch their modules when they are made


@dataclass(frozen=True)
class Shard:
    """`file`: path or URL; `options`: what the builder is told, `features` in the form of a data set's card."""

    builder: str
    name: str
    file: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        query = {"file": self.file} | ({"options": json.dumps(self.options)} if self.options else {})
        return f"{SCHEME}{self.builder}://{self.name}?{urlencode(query, safe='/:@')}"

    @classmethod
    def of(cls, url: str) -> "Shard":
        """The shard that `url` describes."""
        head, _, query = url.partition("?")
        builder, _, name = head.removeprefix(SCHEME).partition("://")
        found = parse_qs(query)
        return cls(builder, name, found["file"][0], json.loads(found.get("options", ["{}"])[0]))


def is_shard(url: str) -> bool:
    return url.startswith(SCHEME)


def stored_at(url: str) -> str:
    """Where the bytes of a file or shard lie."""
    return Shard.of(url).file if is_shard(url) else url


@lru_cache
def library() -> Any:
    """The package `datasets`, told to be quiet: what it has to say comes as an error."""
    import datasets  # takes seconds: pandas and pyarrow come with it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def storage_options(options: ReadOptions) -> dict[str, dict[str, Any]]:
    """fsspec's options by store, as `datasets` takes them."""
    schemes = {name.partition(".")[0] for name in options.storage}
    return {scheme: options.settings(scheme) for scheme in schemes}


def rows_from(shard: Shard, row: int, options: ReadOptions, *, whole: bool) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(row, rows from there on) of a shard; what comes before is read and passed over.

    A row is (its number from 1, the text, or what is wrong where there is none), or with `whole` (its number, all
    columns by name). Raises DataError naming the file when it stays unreadable for `options.retry_budget`, is
    damaged, or has no column of text named `options.text_column`.
    """
    return row, _rows(shard, row, options, None if whole else options.text_column)


def _rows(shard: Shard, row: int, options: ReadOptions, column: str | None) -> Iterator[tuple[int, Any]]:
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


def _tables(shard: Shard, column: str | None, options: ReadOptions) -> Iterator[Any]:
    """The rows of a shard as pyarrow tables, with this column alone where the form allows."""
    try:
        with _opening:
            stream = _builder(shard, options).as_streaming_dataset("train")
        if column is not None and stream.features is not None and column in stream.features:
            stream = stream.select_columns([column])
        yield from stream.with_format("arrow").iter(batch_size=ROWS)
    except DataError:
        raise
    # Each builder has errors of its own.
    except Exception as error:
        raise DataError(
            f"{shard.file}: damaged, or not what the builder {shard.builder!r} reads ({words(error)}); "
            "replace it by an intact copy"
        ) from error


def _builder(shard: Shard, options: ReadOptions) -> Any:
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
