"""Rows of a batch by number, made here or by another process."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stablelm.data.mixture import Cursors, Places
from stablelm.data.order import Cursor, Place
from stablelm.data.packing import Windows

NO_BORDERS = np.zeros(0, np.int64)


class Row(NamedTuple):
    window: np.ndarray  # (seq_len+1,) integers
    lane: int
    place: Place | Places | Cursor | Cursors  # after the window
    filled: int
    borders: np.ndarray  # only where they are needed
    skipped: int  # bad rows, see `packing.Windows`


class Maker(Protocol):
    """Makes rows in the order in which they are asked for; each lane's rows must be asked for in order.

    `receive` gives the rows of the oldest `ask` and raises what their making raised. After `close`, which may
    come from another thread, neither is of use.
    """

    def ask(self, numbers: Sequence[int]) -> None: ...

    def receive(self) -> Iterator[Row]: ...

    def close(self) -> None: ...


class LocalMaker:
    """Makes rows when they are received. Row m of the rank is the next window of its lane m mod `lanes`.

    `windows` are those of the lanes `mine`, each a place below `lanes`; `names` the number of each lane of the rank.
    """

    def __init__(self, windows: Sequence[Windows], mine: range, names: range, *, borders: bool):
        self._windows = dict(zip(mine, windows, strict=True))
        self._names, self._borders = names, borders
        self._asked: deque[Sequence[int]] = deque()

    def ask(self, numbers: Sequence[int]) -> None:
        self._asked.append(numbers)

    def receive(self) -> Iterator[Row]:
        for number in self._asked.popleft():
            place = number % len(self._names)
            windows = self._windows[place]
            window = windows.next()
            borders = windows.borders if self._borders else NO_BORDERS
            yield Row(window, self._names[place], windows.place, windows.filled, borders, windows.skipped)

    def share(self, mine: range) -> "LocalMaker":
        """A maker for some of the lanes, to be used in place of this one."""
        windows = [self._windows[place] for place in mine]
        return LocalMaker(windows, mine, self._names, borders=self._borders)

    def close(self) -> None:
        pass
