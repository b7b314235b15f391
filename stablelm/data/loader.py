"""Batches of one rank, in an order that depends on neither world size nor workers.

Sample n = data_step * global_batch_size + row comes from lane n mod Λ. Rank r of W owns the lanes ≡ r
and so the rows ≡ r mod W. Worker threads each serve some of the rank's lanes, so a lane has one reader.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stablelm.config import mixture
from stablelm.config.schema import DataConfig
from stablelm.data.encoding import IGNORED, Encoder
from stablelm.data.lanes import Cursor, Order, Place
from stablelm.data.mixture import Cursors, MixedWindows, Mixture, Places
from stablelm.data.options import ReadOptions
from stablelm.data.packing import Windows
from stablelm.data.producer import Producer, Row, allow_open_files
from stablelm.data.source_windows import SourceWindows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Rows of one rank for one step: int64 (rows, seq_len); targets are the tokens one place on.

    Row i is row rank + i * world_size of the global batch `data_step`, counted from 0. Tokens and targets may
    share memory and are not to be written to. With best-fit packing a target of -100 is none: it would be
    padding or the first token of another document. `documents`, if asked for, is int32 (rows, seq_len): the
    number of the document within its row to which each token belongs; padding counts as one.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    data_step: int
    documents: "torch.Tensor | None" = None


class Loader:
    """Endless batches of a rank; `world_size` must divide `data.lanes` and `global_batch_size`.

    `files` are text, or all of them prepared shards; with `data.mixture` they are given by source.
    `documents`: number the documents in each batch.
    `next` raises DataError when text became unavailable or is damaged; the loader is closed then.
    `wait_seconds` is the time the last `next` took to get its rows.
    """

    def __init__(
        self,
        files: list[str] | Mapping[str, list[str]],
        tokenizer: Encoder,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        documents: bool = False,
    ):
        assert data.lanes % world_size == 0
        assert global_batch_size % world_size == 0
        self.wait_seconds = 0.0
        self._tokenizer, self._data = tokenizer, data
        sources = files if isinstance(files, Mapping) else {"": files}
        self._orders = {
            name: Order(
                own, seed=f"{seed}/{name}" if name else seed, lanes=data.lanes, shuffle_block=data.shuffle_block
            )
            for name, own in sources.items()
        }
        self._mixture = Mixture.of(mixture.sources(data), seed=seed) if data.mixture else None
        self._batch = global_batch_size
        self._lanes = range(rank, data.lanes, world_size)
        self._rows = global_batch_size // world_size
        self._documents = documents
        self._padding = self._given = 0  # tokens and windows
        self._data_step = 0
        self._cursors: dict[int, Cursor | Cursors] = {}  # where it began
        self._places: dict[int, Place | Places] = {}  # where lanes that have moved since are
        self._producer: Producer | None = None
        self._closed = False

    def next(self) -> Batch:
        """The batch of the next data step."""
        import torch

        assert not self._closed
        if self._producer is None:
            self._producer = self._start()
        began = time.perf_counter()
        first = self._data_step * self._rows
        try:
            rows = self._producer.take(range(first, first + self._rows))
        except BaseException:
            self.close()
            raise
        self.wait_seconds = time.perf_counter() - began
        for row in rows:
            self._places[row.lane] = row.place
        # Joined in the type they come in and then widened; tokens and targets are views of the same memory.
        windows = np.concatenate([row.window for row in rows]).astype(np.int64).reshape(len(rows), -1)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        if self._data.packing == "best_fit":
            targets = _best_fit_targets(rows, targets)
            self._padding += sum(self._data.seq_len + 1 - row.filled for row in rows)
        numbers = torch.from_numpy(_document_numbers(rows, self._data.seq_len)) if self._documents else None
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), self._data_step, numbers)
        self._given += len(rows)
        self._data_step += 1
        return batch

    @property
    def padding_share(self) -> float:
        """Share of the tokens of all batches so far that are padding; 0 but for best-fit packing."""
        return self._padding / max(1, self._given * (self._data.seq_len + 1))

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: `data_step` and the cursors of this rank's lanes that have moved."""
        cursors = self._cursors | {lane: place.cursor() for lane, place in self._places.items()}
        lanes = {str(lane): cursor.to_list() for lane, cursor in sorted(cursors.items())}
        return {"data_step": self._data_step, "lanes": lanes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state whose `lanes` are the union over the ranks of any world size."""
        self._stop()
        self._data_step = int(state["data_step"])
        saved = ((int(lane), _read_cursor(cursor)) for lane, cursor in state["lanes"].items())
        self._cursors, self._places = {lane: cursor for lane, cursor in saved if lane in self._lanes}, {}

    def close(self) -> None:
        """End the threads; there are no batches after this."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    def _start(self) -> "Producer":
        allow_open_files(len(self._lanes) * len(self._orders))
        # Ahead of the batch being asked for, at least one row must be allowed.
        ahead = max(self._data.prefetch, 1) * self._rows
        first = self._data_step * self._rows
        borders = self._documents or self._data.packing == "best_fit"
        return Producer(
            self._packers(),
            self._lanes,
            first,
            batch=self._rows,
            workers=self._data.workers,
            ahead=ahead,
            borders=borders,
        )

    def _packers(self) -> list[Windows]:
        """The windows of each lane of this rank."""
        options = ReadOptions.of(self._data, lanes=len(self._lanes) * len(self._orders))
        shared = {
            name: SourceWindows(order, self._tokenizer, self._data, lanes=len(self._lanes), options=options)
            for name, order in self._orders.items()
        }
        if self._mixture is None:
            (source,) = shared.values()
            return [source.of(lane, _of_source(self._cursors.get(lane), "")) for lane in self._lanes]
        mixture = self._mixture
        return [self._mixed(lane, shared, mixture) for lane in self._lanes]

    def _mixed(self, lane: int, shared: dict[str, SourceWindows], mixture: Mixture) -> MixedWindows:
        cursors = self._cursors.get(lane) or Cursors()
        assert isinstance(cursors, Cursors)
        parts = {name: source.of(lane, cursors.get(name)) for name, source in shared.items()}
        samples = self._data_step * self._batch
        given = max(0, -(-(samples - lane) // self._data.lanes))
        return MixedWindows(parts, mixture, lane=lane, lanes=self._data.lanes, batch=self._batch, given=given)

    def epochs(self) -> dict[str, float]:
        """How often each source was read, by name ('' for the only one): the mean over this rank's lanes.

        Whole entries count, so a lane that is in the middle of a file counts it as not read.
        """
        moved = self._cursors | {lane: place.cursor() for lane, place in self._places.items()}
        told = {}
        for name, order in self._orders.items():
            cursors = [_of_source(moved.get(lane), name) for lane in self._lanes]
            turns = [order.turns(cursor) if cursor else 0.0 for cursor in cursors]
            told[name] = sum(turns) / len(turns)
        return told


def _seed(seed: int, name: str) -> int | str:
    """Of the order of a source: files of several sources may have the same names."""
    return f"{seed}/{name}" if name else seed


def _of_source(cursor: Cursor | Cursors | None, name: str) -> Cursor | None:
    return cursor.get(name) if isinstance(cursor, Cursors) else cursor


def _read_cursor(saved: Any) -> Cursor | Cursors:
    """A lane's entry in a saved state: of the only source, or of each of several."""
    if isinstance(saved, Mapping):
        return Cursors((name, Cursor(*cursor)) for name, cursor in saved.items())
    return Cursor(*saved)


def _document_numbers(rows: "list[Row]", seq_len: int) -> np.ndarray:
    """int32 (rows, seq_len): counted from 0 in each row; padding is a document of its own."""
    numbers = np.zeros((len(rows), seq_len), np.int32)
    for row, marks in zip(rows, numbers, strict=True):
        marks[row.borders] = 1
        if row.filled < seq_len:
            marks[row.filled] = 1
    return numbers.cumsum(axis=1, dtype=np.int32)


def _best_fit_targets(rows: "list[Row]", targets: np.ndarray) -> np.ndarray:
    """A copy of `targets` without those that begin a document or are padding."""
    targets = targets.copy()
    for row, values in zip(rows, targets, strict=True):
        values[row.borders - 1] = IGNORED
        values[row.filled - 1 :] = IGNORED
    return targets
