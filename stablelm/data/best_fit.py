"""Windows without cut documents: the documents of a block, best fit first (Ding et al. 2024, arXiv 2404.10830).

Each document goes whole into the fullest window that still has room for it, longest documents first. One
that is longer than a window is split before that, its pieces overlapping by one token, so that each
token but a document's first is predicted once. Nothing is predicted across borders, and what is left
of a window is padding.
"""

import sys
from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from stablelm.data.order import Chunk, Cursor, Place
from stablelm.errors import DataError

NONE = np.zeros(0, np.int64)


def fit(lengths: list[int], size: int) -> list[list[int]]:
    """Items of each bin of this size, none of them longer: best-fit decreasing. Bins come by their first item.

    Equal lengths are taken in order, and of equally full bins the one that was opened first.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect_left(room, (lengths[item], 0))
        if place == len(room):
            left, target = size, len(bins)
            bins.append([])
        else:
            left, target = room.pop(place)
        bins[target].append(item)
        insort(room, (left - lengths[item], target))
    return sorted(sorted(items) for items in bins)


class BestFitPacker:
    """Windows of one lane, see `packing.Windows`; a cursor's index counts the windows of its block already given.

    `chunks` yields whole blocks, from the one of `start` on. Raises DataError when the block of `start` has
    fewer windows than were given of it.
    """

    def __init__(self, chunks: Iterator[Chunk], seq_len: int, eos: int, start: Cursor):
        self.borders, self.filled, self.skipped = NONE, 0, 0
        self.place = _place(start, start.index)
        self._chunks, self._size, self._eos = chunks, seq_len + 1, eos
        self._block = start
        self._windows: list[list[tuple[int, int]]] = []
        self._tokens = NONE
        self._next = start.index
        self._resumed = start.index > 0

    def next(self) -> np.ndarray:
        """The next window, (seq_len+1,): pieces of documents, then eos as padding."""
        self.skipped = 0
        while self._next >= len(self._windows):
            self._read()
        pieces = self._windows[self._next]
        self._next += 1
        self.place = _place(self._block, self._next)
        ends = np.cumsum([end - begin for begin, end in pieces])
        self.borders, self.filled = ends[:-1], int(ends[-1])
        window = np.full(self._size, self._eos, self._tokens.dtype)
        window[: self.filled] = np.concatenate([self._tokens[begin:end] for begin, end in pieces])
        return window

    def _read(self) -> None:
        chunk = next(self._chunks)
        pieces = _pieces(chunk.ends, self._size)
        bins = fit([end - begin for begin, end in pieces], self._size)
        self._windows = [[pieces[item] for item in items] for items in bins]
        self._tokens = chunk.tokens
        if not self._resumed:
            self._next = 0
            self.skipped += chunk.skipped
        elif self._next > len(self._windows):
            raise DataError(
                f"data.path: a block has {len(self._windows)} windows and no number {self._next} any more, it changed "
                "since the checkpoint; put the old files back, or start a new run"
            )
        self._resumed = False
        self._block = Cursor(chunk.cursor.epoch, chunk.cursor.entry, chunk.cursor.block, 0, 0)


def _pieces(ends: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Spans of at most `size` tokens; a document of one token has nothing to predict and no piece."""
    pieces, begin = [], 0
    for end in ends.tolist():
        pieces += [(first, min(first + size, end)) for first in range(begin, end - 1, size - 1)]
        begin = end
    return pieces


def _place(block: Cursor, given: int) -> Place:
    return Place(Cursor(block.epoch, block.entry, block.block, given, 0), NONE, sys.maxsize, 0)
