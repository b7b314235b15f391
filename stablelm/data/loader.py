"""Batches of one rank, in an order that depends on neither world size nor workers.

Sample n = data_step * global_batch_size + row comes from lane n mod Λ. Rank r of W owns the lanes ≡ r
and so the rows ≡ r mod W. Worker threads each serve some of the rank's lanes, so a lane has one reader.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stablelm.config.schema import DataConfig
from stablelm.data.best_fit import BestFitPacker
from stablelm.data.encoding import IGNORED, Encoder
from stablelm.data.lanes import Cursor, Lane, Order, Place
from stablelm.data.options import ReadOptions
from stablelm.data.packing import Packer, Windows
from stablelm.data.shard_lane import ShardLane
from stablelm.data.shards import SharedShards, is_shard
from stablelm.data.source import SharedFiles

if TYPE_CHECKING:
    import torch

# Descriptors left to everything but the lanes' open files.
OTHER_FILES = 256
NO_BORDERS = np.zeros(0, np.int64)


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


class _Row(NamedTuple):
    window: np.ndarray  # (seq_len+1,) integers
    lane: int
    place: Place  # after the window
    filled: int
    borders: np.ndarray  # only where they are needed


class Loader:
    """Endless batches of a rank; `world_size` must divide `data.lanes` and `global_batch_size`.

    `files` are text, or all of them prepared shards. `documents`: number the documents in each batch.
    `next` raises DataError when text became unavailable or is damaged; the loader is closed then.
    `wait_seconds` is the time the last `next` took to get its rows.
    """

    def __init__(
        self,
        files: list[str],
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
        self._order = Order(files, seed=seed, lanes=data.lanes, shuffle_block=data.shuffle_block)
        self._lanes = range(rank, data.lanes, world_size)
        self._rows = global_batch_size // world_size
        self._documents = documents
        self._padding = self._given = 0  # tokens and windows
        self._data_step = 0
        self._cursors: dict[int, Cursor] = {}  # where it began
        self._places: dict[int, Place] = {}  # where lanes that have moved since are
        self._producer: _Producer | None = None
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
        saved = ((int(lane), Cursor(*cursor)) for lane, cursor in state["lanes"].items())
        self._cursors, self._places = {lane: cursor for lane, cursor in saved if lane in self._lanes}, {}

    def close(self) -> None:
        """End the threads; there are no batches after this."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    def _start(self) -> "_Producer":
        _allow_open_files(len(self._lanes) + OTHER_FILES)
        # Ahead of the batch being asked for, at least one row must be allowed.
        ahead = max(self._data.prefetch, 1) * self._rows
        first = self._data_step * self._rows
        borders = self._documents or self._data.packing == "best_fit"
        return _Producer(
            self._packers(),
            self._lanes,
            first,
            batch=self._rows,
            workers=self._data.workers,
            ahead=ahead,
            borders=borders,
        )

    def _packers(self) -> list[Windows]:
        data, order = self._data, self._order
        options, packers = ReadOptions.of(data, lanes=len(self._lanes)), []
        shared = _shared(order.files, self._tokenizer, lanes=len(self._lanes), options=options)
        best_fit = data.packing == "best_fit"
        for lane in self._lanes:
            start = self._cursors.get(lane) or order.start(lane)
            first = replace(start, index=0) if best_fit else start
            if isinstance(shared, SharedShards):
                chunks = ShardLane(order, lane, shared).chunks(first, whole_blocks=best_fit)
            else:
                chunks = Lane(order, lane, shared, options=options).chunks(
                    first, self._tokenizer, whole_blocks=best_fit
                )
            if best_fit:
                packers.append(BestFitPacker(chunks, data.seq_len, self._tokenizer.eos, start))
            else:
                packers.append(Packer(chunks, data.seq_len, start))
        return packers


def _shared(files: list[str], tokenizer: Encoder, *, lanes: int, options: ReadOptions) -> SharedFiles | SharedShards:
    if all(map(is_shard, files)):
        return SharedShards(tokenizer.sha256, lanes=lanes, options=options)
    return SharedFiles(len(files), options=options)


def _document_numbers(rows: "list[_Row]", seq_len: int) -> np.ndarray:
    """int32 (rows, seq_len): counted from 0 in each row; padding is a document of its own."""
    numbers = np.zeros((len(rows), seq_len), np.int32)
    for row, marks in zip(rows, numbers, strict=True):
        marks[row.borders] = 1
        if row.filled < seq_len:
            marks[row.filled] = 1
    return numbers.cumsum(axis=1, dtype=np.int32)


def _best_fit_targets(rows: "list[_Row]", targets: np.ndarray) -> np.ndarray:
    """A copy of `targets` without those that begin a document or are padding."""
    targets = targets.copy()
    for row, values in zip(rows, targets, strict=True):
        values[row.borders - 1] = IGNORED
        values[row.filled - 1 :] = IGNORED
    return targets


class _Producer:
    """Rows of a rank by number: row m is the next window of its lane m mod (lanes of the rank).

    Worker i of T serves the rank's lanes ≡ i mod T, in the order of the rows, at most `ahead` rows
    before the batch that was last asked for ends. Without workers `take` makes the rows itself.
    """

    def __init__(
        self,
        packers: list[Windows],
        lanes: range,
        first: int,
        *,
        batch: int,
        workers: int,
        ahead: int,
        borders: bool,
    ):
        self._packers, self._lanes, self._borders = packers, lanes, borders
        self._batch, self._ahead = batch, ahead
        self._ready: dict[int, _Row | BaseException] = {}
        self._limit = first + ahead
        self._closed = False
        lock = threading.Lock()
        self._room, self._filled = threading.Condition(lock), threading.Condition(lock)
        workers = min(workers, len(packers))
        self._threads = [
            threading.Thread(target=self._work, args=(first, index, workers), name=f"data-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, numbers: range) -> list[_Row]:
        """The rows of these numbers; raises what their making raised."""
        if not self._threads:
            return [self._make(number) for number in numbers]
        rows = []
        with self._filled:
            self._limit = numbers.stop + self._ahead
            self._room.notify_all()
            for number in numbers:
                while number not in self._ready:
                    if self._closed:
                        raise RuntimeError("the loader was closed while a batch was waited for")
                    self._filled.wait()
                row = self._ready.pop(number)
                if isinstance(row, BaseException):
                    raise row
                rows.append(row)
        return rows

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
            self._filled.notify_all()
        for thread in self._threads:
            # One that waits for a store ends by itself later; a daemon does not keep the program alive.
            thread.join(timeout=1.0)

    def _make(self, number: int) -> _Row:
        place = number % len(self._packers)
        packer = self._packers[place]
        window = packer.next()
        borders = packer.borders if self._borders else NO_BORDERS
        return _Row(window, self._lanes[place], packer.place, packer.filled, borders)

    def _work(self, first: int, index: int, workers: int) -> None:
        while True:
            with self._room:
                while first >= self._limit and not self._closed:
                    self._room.wait()
                if self._closed:
                    return
            # The rows of a batch are handed over together: a thread's turn costs more than a row of shards.
            made: dict[int, _Row | BaseException] = {}
            failed = False
            for number in range(first, first + self._batch):
                if self._closed:
                    return
                if number % len(self._packers) % workers != index:
                    continue
                try:
                    made[number] = self._make(number)
                except BaseException as error:
                    made[number], failed = error, True
                    break
            with self._filled:
                self._ready |= made
                self._filled.notify()
            if failed or self._closed:
                return
            first += self._batch


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files so that every lane can hold one; the hard limit stays."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
