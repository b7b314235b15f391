"""From a lane's tokens to windows of seq_len+1 tokens, and from the windows of a rank's lanes to the rows of a batch.

`Packer` concatenates and splits: documents, each followed by eos, are joined, and a window begins with the last token
of the one before, so each token is predicted exactly once.

`BestFitPacker` cuts no document that fits (Ding et al. 2024, arXiv 2404.10830): each goes whole into the fullest window
of its block that still has room for it, longest documents first. One that is longer than a window is split before
that, its pieces overlapping by one token, so that each token but a document's first is predicted once. Nothing is
predicted across borders, and the rest of a window is padding.
"""

import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stablelm.data.batched_tokenization import BlockTokens, LaneTokens
from stablelm.data.order import Cursor, ShardLane, TokenChunk, TokenPosition
from stablelm.errors import DataError

NO_TOKENS = NO_BORDERS = np.zeros(0, np.int64)


class SourceCursors(dict[str, Cursor]):
    """The cursors of one lane in each source."""

    def to_list(self) -> dict[str, list[int]]:
        return {name: cursor.to_list() for name, cursor in self.items()}

    def cursor(self) -> "SourceCursors":
        """Itself, as of any position."""
        return self


class SourcePositions(NamedTuple):
    """The positions of one lane in each source."""

    parts: dict[str, TokenPosition]

    def cursor(self) -> SourceCursors:
        return SourceCursors((name, position.cursor()) for name, position in self.parts.items())


class LaneWindows(Protocol):
    """Windows of one lane. `position` is where the next window begins; its cursor is all that is saved.

    Of the window given last: `borders` are the indices in it, from 1 on and ascending, where another document
    begins; `filled` tokens of it are text, the others padding; `skipped` bad rows came before its first token and
    after that of the window before it.
    """

    @property
    def position(self) -> Any: ...

    @property
    def filled(self) -> int: ...

    @property
    def borders(self) -> np.ndarray: ...

    @property
    def skipped(self) -> int: ...

    def next_window(self) -> np.ndarray: ...


class Packer:
    """Concatenate and split; see `LaneWindows`.

    `chunks` gives documents from the one of `start` on; the first start.offset tokens of that document
    have been inputs already.
    """

    def __init__(self, chunks: LaneTokens | ShardLane, seq_len: int, start: Cursor):
        self.position = TokenPosition(start, NO_BORDERS, sys.maxsize, start.offset)
        self.filled, self.skipped = seq_len + 1, 0
        self._chunks, self._seq_len = chunks, seq_len
        self._skip = start.offset
        self._waiting: deque[TokenChunk] = deque()
        self._position = 0  # in the first chunk that waits: the next input
        self._length = 0  # tokens that wait, from there on
        self._given: list[
            tuple[TokenChunk, int]
        ] = []  # chunks of the last window, and the index of their first token in it

    def next_window(self) -> np.ndarray:
        """The next window, integers (seq_len+1,), not to be written to. Raises DataError when a document is lost."""
        seq_len = self._seq_len
        while self._length <= seq_len:
            self._read()
        first, begin = self._waiting[0], self._position
        end = begin + seq_len
        self.skipped = 0
        self._given = [(first, -begin)]
        if end < len(first.tokens):
            window = first.tokens[begin : end + 1]
        else:
            window = self._joined(seq_len + 1)
            while end >= len(first.tokens):
                end -= len(first.tokens)
                # Bad rows end their chunk: the next window begins behind them.
                self.skipped += self._waiting.popleft().skipped
                first = self._waiting[0]
        self._length -= seq_len
        self._position = end
        self.position = TokenPosition(first.cursor, first.ends, first.block_rows, end)
        return window

    @property
    def borders(self) -> np.ndarray:
        """Indices of the last window's inputs where another document begins, (n,) int64."""
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
        chunk = self._chunks.next_chunk()
        if self._skip:
            # A document that a mask has emptied since the checkpoint has nothing to skip.
            self._position = min(self._skip, int(chunk.ends[0]))
            self._length -= self._position
            self._skip = 0
        self._waiting.append(chunk)
        self._length += len(chunk.tokens)


def fit(lengths: list[int], size: int) -> list[list[int]]:
    """Items of each bin of this size, none of them longer: best-fit decreasing. Bins come by their first item.

    Equal lengths are taken in order, and of equally full bins the one that was opened first.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room in the bin, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        found = bisect_left(room, (lengths[item], 0))
        if found == len(room):
            free, target = size, len(bins)
            bins.append([])
        else:
            free, target = room.pop(found)
        bins[target].append(item)
        insort(room, (free - lengths[item], target))
    return sorted(sorted(items) for items in bins)


class BestFitPacker:
    """Windows of one lane, see `LaneWindows`; a cursor's index counts the windows of its block already given.

    `chunks` gives whole blocks, from the one of `start` on. Raises DataError when the block of `start` has
    fewer windows than were given of it.
    """

    def __init__(self, chunks: BlockTokens | ShardLane, seq_len: int, eos: int, start: Cursor):
        self.borders, self.filled, self.skipped = NO_BORDERS, 0, 0
        self.position = _window_position(start, start.index)
        self._chunks, self._size, self._eos = chunks, seq_len + 1, eos
        self._block = start
        self._windows: list[list[tuple[int, int]]] = []
        self._tokens = NO_TOKENS
        self._next = start.index
        self._resumed = start.index > 0

    def next_window(self) -> np.ndarray:
        """The next window, (seq_len+1,): pieces of documents, then eos as padding."""
        self.skipped = 0
        while self._next >= len(self._windows):
            self._read()
        pieces = self._windows[self._next]
        self._next += 1
        self.position = _window_position(self._block, self._next)
        ends = np.cumsum([end - begin for begin, end in pieces])
        self.borders, self.filled = ends[:-1], int(ends[-1])
        window = np.full(self._size, self._eos, self._tokens.dtype)
        window[: self.filled] = np.concatenate([self._tokens[begin:end] for begin, end in pieces])
        return window

    def _read(self) -> None:
        chunk = self._chunks.next_chunk()
        pieces = _pieces(chunk.ends, self._size)
        bins = fit([end - begin for begin, end in pieces], self._size)
        self._windows = [[pieces[item] for item in items] for items in bins]
        self._tokens = chunk.tokens
        if not self._resumed:
            self._next = 0
            self.skipped += chunk.skipped
        elif self._next > len(self._windows):
            raise DataError(
                f"data.path: a block has {len(self._windows)} windows, not the {self._next} already used: it changed "
                "since the checkpoint; put the old files back, or start a new run"
            )
        self._resumed = False
        self._block = Cursor(chunk.cursor.epoch, chunk.cursor.entry, chunk.cursor.block, 0, 0)


def _pieces(ends: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Spans of at most `size` tokens; a document of one token has nothing to predict and gives no piece."""
    pieces, begin = [], 0
    for end in ends.tolist():
        pieces += [(first, min(first + size, end)) for first in range(begin, end - 1, size - 1)]
        begin = end
    return pieces


def _window_position(block: Cursor, given: int) -> TokenPosition:
    return TokenPosition(Cursor(block.epoch, block.entry, block.block, given, 0), NO_BORDERS, sys.maxsize, 0)


class BatchRow(NamedTuple):
    window: np.ndarray  # (seq_len+1,) integers
    lane: int
    position: TokenPosition | SourcePositions | Cursor | SourceCursors  # after the window
    filled: int
    borders: np.ndarray  # only where they are needed
    skipped: int  # bad rows, see `LaneWindows`


class RowMaker(Protocol):
    """Makes rows in the order of the requests; each lane's rows must be requested in order.

    `receive` gives the rows of the oldest `ask` and raises what their making raised. `close` may be called
    by another thread; afterwards nothing else may be called.
    """

    def ask(self, numbers: Sequence[int]) -> None: ...

    def receive(self) -> Iterator[BatchRow]: ...

    def close(self) -> None: ...


class LaneRows:
    """Makes rows when they are received. Row m of the rank is the next window of its lane m mod `lanes`.

    `windows` are those of the lanes `mine`, each an index below `lanes`; `names` the number of each lane of the rank.
    """

    def __init__(self, windows: Sequence[LaneWindows], mine: range, names: range, *, borders: bool):
        self._windows = dict(zip(mine, windows, strict=True))
        self._names, self._borders = names, borders
        self._asked: deque[Sequence[int]] = deque()

    def take(self, numbers: range) -> list[BatchRow]:
        """The rows of these numbers, made now."""
        return list(self._rows(numbers))

    def ask(self, numbers: Sequence[int]) -> None:
        self._asked.append(numbers)

    def receive(self) -> Iterator[BatchRow]:
        return self._rows(self._asked.popleft())

    def _rows(self, numbers: Sequence[int]) -> Iterator[BatchRow]:
        lanes, names, with_borders = self._windows, self._names, self._borders
        count = len(names)
        for number in numbers:
            index = number % count
            windows = lanes[index]
            window = windows.next_window()
            borders = windows.borders if with_borders else NO_BORDERS
            yield BatchRow(window, names[index], windows.position, windows.filled, borders, windows.skipped)

    def share(self, mine: range) -> "LaneRows":
        """A maker for some of the lanes, to be used in place of this one."""
        windows = [self._windows[index] for index in mine]
        return LaneRows(windows, mine, self._names, borders=self._borders)

    def close(self) -> None:
        pass
