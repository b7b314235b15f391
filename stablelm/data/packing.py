"""From a lane's documents to windows of tokens: concatenate and split.

Documents, each followed by eos, are joined. A window holds seq_len+1 tokens and begins with the last
token of the one before, so each token is predicted exactly once.
"""

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from stablelm.data.order import Chunk, Cursor, Place


class Windows(Protocol):
    """Windows of one lane. `place` is where the next window begins; its cursor is all there is to save.

    Of the window given last: `borders` are its places, from 1 on and ascending, where another document
    begins; `filled` tokens of it are text, the others padding; `skipped` bad rows came before its first token and
    after that of the window before it.
    """

    @property
    def place(self) -> Any: ...

    @property
    def filled(self) -> int: ...

    @property
    def borders(self) -> np.ndarray: ...

    @property
    def skipped(self) -> int: ...

    def next(self) -> np.ndarray: ...


class Packer:
    """Concatenate and split; see `Windows`.

    `chunks` yields documents from the one of `start` on; the first start.offset tokens of that document
    have been inputs already.
    """

    def __init__(self, chunks: Iterator[Chunk], seq_len: int, start: Cursor):
        self.place = Place(start, np.zeros(0, np.int64), sys.maxsize, start.offset)
        self.filled, self.skipped = seq_len + 1, 0
        self._chunks, self._seq_len = chunks, seq_len
        self._skip = start.offset
        self._waiting: deque[Chunk] = deque()
        self._position = 0  # in the first chunk that waits: the next input
        self._length = 0  # tokens that wait, from there on
        self._given: list[tuple[Chunk, int]] = []  # chunks of the last window, and where in it their tokens 0 lie

    def next(self) -> np.ndarray:
        """The next window, integers (seq_len+1,), not to be written to. Raises DataError when a document is lost."""
        while self._length <= self._seq_len:
            self._read()
        first, begin = self._waiting[0], self._position
        end = begin + self._seq_len
        self.skipped = 0
        self._given = [(first, -begin)]
        if end < len(first.tokens):
            window = first.tokens[begin : end + 1]
        else:
            window = self._joined(self._seq_len + 1)
            while end >= len(first.tokens):
                end -= len(first.tokens)
                # Bad rows end their chunk: the next window begins behind them.
                self.skipped += self._waiting.popleft().skipped
                first = self._waiting[0]
        self._length -= self._seq_len
        self._position = end
        self.place = Place(first.cursor, first.ends, first.block_rows, end)
        return window

    @property
    def cursor(self) -> Cursor:
        """Where the next window begins."""
        return self.place.cursor()

    @property
    def borders(self) -> np.ndarray:
        """Places of the last window's inputs where another document begins, (n,) int64."""
        ends = np.concatenate([chunk.ends + shift for chunk, shift in self._given])
        return np.unique(ends[(ends > 0) & (ends < self._seq_len)])

    def _joined(self, size: int) -> np.ndarray:
        """The next `size` tokens out of several chunks."""
        first, parts = self._waiting[0], []
        missing = size - (len(first.tokens) - self._position)
        parts.append(first.tokens[self._position :])
        for chunk in list(self._waiting)[1:]:
            self._given.append((chunk, size - missing))
            parts.append(chunk.tokens[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        return np.concatenate(parts)

    def _read(self) -> None:
        chunk = next(self._chunks)
        if self._skip:
            # A document that a mask has emptied since the checkpoint has nothing to skip.
            self._position = min(self._skip, int(chunk.ends[0]))
            self._length -= self._position
            self._skip = 0
        self._waiting.append(chunk)
        self._length += len(chunk.tokens)
