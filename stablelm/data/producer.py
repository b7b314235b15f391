"""Rows of a rank, made ahead by threads that each serve some of its lanes or listen to a process that does."""

import threading
from collections import deque
from collections.abc import Sequence

from stablelm.data.rows import Maker, Row

# Descriptors left to everything but the lanes' open files.
OTHER_FILES = 256


class Producer:
    """Rows of a rank by number.

    Maker i of T serves the rank's lanes ≡ i mod T, and so its rows ≡ i mod T within each turn of the lanes; a thread
    each keeps it at work, at most `ahead` rows before the batch that was last asked for ends, with `depth` batches
    asked for at a time. Without threads there is one maker, which works when `take` is called.
    """

    def __init__(
        self, makers: Sequence[Maker], lanes: int, first: int, *, batch: int, ahead: int, depth: int, threads: bool
    ):
        self._makers, self._lanes = makers, lanes
        self._batch, self._ahead, self._depth = batch, ahead, depth
        self._ready: dict[int, Row | BaseException] = {}
        self._limit = first + ahead
        self._closed = False
        lock = threading.Lock()
        self._room, self._filled = threading.Condition(lock), threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._work, args=(first, index), name=f"data-{index}", daemon=True)
            for index in range(len(makers) if threads else 0)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, numbers: range) -> list[Row]:
        """The rows of these numbers; raises what their making raised."""
        if not self._threads:
            (maker,) = self._makers
            maker.ask(numbers)
            return list(maker.receive())
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
        for maker in self._makers:
            maker.close()
        for thread in self._threads:
            # One that waits for a store ends by itself later; a daemon does not keep the program alive.
            thread.join(timeout=1.0)

    def _work(self, first: int, index: int) -> None:
        maker, asked = self._makers[index], deque[list[int]]()
        while True:
            with self._room:
                while not asked and first >= self._limit and not self._closed:
                    self._room.wait()
                limit = self._limit
            while len(asked) < self._depth and first < limit:
                asked.append(self._share(range(first, first + self._batch), index))
                maker.ask(asked[-1])
                first += self._batch
            made = self._receive(maker, asked.popleft()) if asked else {}
            with self._filled:
                if self._closed:
                    return
                # The rows of a batch are handed over together: a thread's turn costs more than a row of shards.
                self._ready |= made
                self._filled.notify()
            if any(isinstance(row, BaseException) for row in made.values()):
                return

    def _share(self, numbers: range, index: int) -> list[int]:
        return [number for number in numbers if number % self._lanes % len(self._makers) == index]

    def _receive(self, maker: Maker, numbers: list[int]) -> dict[int, Row | BaseException]:
        made: dict[int, Row | BaseException] = {}
        rows = maker.receive()
        for number in numbers:
            if self._closed:
                break
            try:
                made[number] = next(rows)
            except BaseException as error:
                made[number] = error
                break
        return made


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
