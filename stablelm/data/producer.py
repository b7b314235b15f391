"""Rows of a rank, made ahead by threads that each serve some of its lanes."""

import threading
from typing import NamedTuple

import numpy as np

from stablelm.data.lanes import Place
from stablelm.data.mixture import Places
from stablelm.data.packing import Windows

# Descriptors left to everything but the lanes' open files.
OTHER_FILES = 256
NO_BORDERS = np.zeros(0, np.int64)


class Row(NamedTuple):
    window: np.ndarray  # (seq_len+1,) integers
    lane: int
    place: Place | Places  # after the window
    filled: int
    borders: np.ndarray  # only where they are needed


class Producer:
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
        self._ready: dict[int, Row | BaseException] = {}
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

    def take(self, numbers: range) -> list[Row]:
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

    def _make(self, number: int) -> Row:
        place = number % len(self._packers)
        packer = self._packers[place]
        window = packer.next()
        borders = packer.borders if self._borders else NO_BORDERS
        return Row(window, self._lanes[place], packer.place, packer.filled, borders)

    def _work(self, first: int, index: int, workers: int) -> None:
        while True:
            with self._room:
                while first >= self._limit and not self._closed:
                    self._room.wait()
                if self._closed:
                    return
            # The rows of a batch are handed over together: a thread's turn costs more than a row of shards.
            made: dict[int, Row | BaseException] = {}
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


def allow_open_files(lanes: int) -> None:
    """Raise the soft limit of open files so that every lane can hold one; the hard limit stays."""
    count = lanes + OTHER_FILES
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
