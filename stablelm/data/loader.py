"""Batches of one rank, in an order that depends on neither world size nor workers.

Sample n = data_step * global_batch_size + row comes from lane n mod Λ. Rank r of W owns the lanes ≡ r
and so the rows ≡ r mod W. Worker threads each serve some of the rank's lanes, so a lane has one reader.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stablelm.config.schema import DataConfig
from stablelm.data.encoding import Encoder
from stablelm.data.lanes import Cursor, Lane, Order
from stablelm.data.packing import Packer
from stablelm.data.shards import SharedShards, is_shard
from stablelm.data.source import SharedFiles

if TYPE_CHECKING:
    import torch

# Descriptors left to everything but the lanes' open files.
OTHER_FILES = 256


@dataclass(frozen=True)
class Batch:
    """Rows of one rank for one step: int64 (rows, seq_len); targets are the tokens one place on.

    Row i is row rank + i * world_size of the global batch `data_step`, counted from 0.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    data_step: int


@dataclass(frozen=True)
class _Row:
    window: np.ndarray  # (seq_len+1,) integers
    lane: int
    cursor: Cursor  # after the window


class Loader:
    """Endless batches of a rank; `world_size` must divide `data.lanes` and `global_batch_size`.

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
    ):
        assert data.lanes % world_size == 0
        assert global_batch_size % world_size == 0
        self.wait_seconds = 0.0
        self._tokenizer, self._data = tokenizer, data
        self._order = Order(files, seed=seed, lanes=data.lanes, shuffle_block=data.shuffle_block)
        self._lanes = range(rank, data.lanes, world_size)
        self._rows = global_batch_size // world_size
        self._data_step = 0
        self._cursors: dict[int, Cursor] = {}
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
        self._cursors.update((row.lane, row.cursor) for row in rows)
        # Joined in the type they come in, so that each token is widened once for each of the two tensors.
        windows = np.concatenate([row.window for row in rows]).reshape(len(rows), -1)
        tokens, targets = np.empty((2, len(rows), self._data.seq_len), np.int64)
        tokens[:], targets[:] = windows[:, :-1], windows[:, 1:]
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), self._data_step)
        self._data_step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: `data_step` and the cursors of this rank's lanes that have moved."""
        lanes = {str(lane): cursor.to_list() for lane, cursor in sorted(self._cursors.items())}
        return {"data_step": self._data_step, "lanes": lanes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state whose `lanes` are the union over the ranks of any world size."""
        self._stop()
        self._data_step = int(state["data_step"])
        saved = ((int(lane), Cursor(*cursor)) for lane, cursor in state["lanes"].items())
        self._cursors = {lane: cursor for lane, cursor in saved if lane in self._lanes}

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
        budget = self._data.retry_budget
        files = self._order.files
        if all(map(is_shard, files)):
            shared = SharedShards(self._tokenizer.sha256, lanes=len(self._lanes), retry_budget=budget)
        else:
            shared = SharedFiles(len(files), retry_budget=budget)
        packers = []
        for lane in self._lanes:
            start = self._cursors.get(lane) or self._order.start(lane)
            chunks = Lane(self._order, lane, shared, retry_budget=budget).chunks(start, self._tokenizer)
            packers.append(Packer(chunks, self._data.seq_len, start))
        # Ahead of the batch being asked for, at least one row must be allowed.
        ahead = max(self._data.prefetch, 1) * self._rows
        first = self._data_step * self._rows
        return _Producer(packers, self._lanes, first, workers=self._data.workers, ahead=ahead)


class _Producer:
    """Rows of a rank by number: row m is the next window of its lane m mod (lanes of the rank).

    Worker i of T serves the rank's lanes ≡ i mod T, in the order of the rows, at most `ahead` rows
    before the batch that was last asked for ends. Without workers `take` makes the rows itself.
    """

    def __init__(self, packers: list[Packer], lanes: range, first: int, *, workers: int, ahead: int):
        self._packers, self._lanes, self._ahead = packers, lanes, ahead
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
        return _Row(window, self._lanes[place], packer.cursor)

    def _work(self, first: int, index: int, workers: int) -> None:
        number = first
        while True:
            if number % len(self._packers) % workers != index:
                number += 1
                continue
            with self._room:
                while number >= self._limit and not self._closed:
                    self._room.wait()
                if self._closed:
                    return
            try:
                row = self._make(number)
            except BaseException as error:
                row = error
            with self._filled:
                self._ready[number] = row
                self._filled.notify()
            if isinstance(row, BaseException):
                return
            number += 1


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
