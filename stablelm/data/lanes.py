"""The order of documents: which document comes next in which lane.

Lane l of Λ reads the entries l, l+Λ, l+2Λ, ... of one endless sequence of entries. An epoch of it is a
keyed permutation of the files; with fewer files than lanes each file counts as S = ceil(Λ/F) entries, and
share k of a file holds its rows ≡ k mod S. Rows of a share are shuffled in blocks by a keyed permutation.
Nothing here knows of ranks or workers, and keys hold base names only (of a prepared shard: its source's),
so data may move, and be prepared, at any time.

Keyed permutation: the SHAKE-256 stream of the key gives each item a 64-bit number, and a stable sort by
it gives the order. It depends on neither platform nor library version.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np

from stablelm.data.encoding import Encoder, document_tokens
from stablelm.data.shards import PART, SharedShards, ShardRows, source_name
from stablelm.data.source import FileRows, Row, SharedFiles, document_text
from stablelm.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """A place in a lane: row `index` (in shuffled order) of block `block` of an entry of an epoch.

    `offset` counts the tokens of that document, its eos included, which have been inputs already.
    """

    epoch: int
    entry: int
    block: int
    index: int
    offset: int

    def to_list(self) -> list[int]:
        return list(astuple(self))


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a block, the first one at `cursor` (offset 0).

    `tokens` (n,) are theirs, eos of each included; `ends` (documents,) int64 says where each ends in `tokens`.
    """

    cursor: Cursor
    tokens: np.ndarray
    ends: np.ndarray


def permutation(size: int, *key: int | str) -> list[int]:
    """A permutation of range(size) determined by the key alone; see the module's text."""
    return _permuted(size, *key).tolist()


def _permuted(size: int, *key: int | str) -> np.ndarray:
    stream = hashlib.shake_256("\0".join(map(str, key)).encode()).digest(8 * size)
    return np.argsort(np.frombuffer(stream, "<u8"), kind="stable")


class Order:
    """The endless sequence of entries over `files` for `lanes` lanes: pure arithmetic, no reading."""

    def __init__(self, files: list[str], *, seed: int, lanes: int, shuffle_block: int):
        assert files
        self.files = sorted(files, key=source_name)
        self.seed = seed
        self.lanes = lanes
        self.shuffle_block = shuffle_block
        self.shares = -(-lanes // len(files)) if len(files) < lanes else 1
        self.entries = len(files) * self.shares
        self._epochs: dict[int, list[int]] = {}

    def start(self, lane: int) -> Cursor:
        """Where a lane begins."""
        return Cursor(0, lane, 0, 0, 0)

    def following(self, epoch: int, entry: int) -> tuple[int, int]:
        """(epoch, entry) that the lane of this entry takes next."""
        turns, entry = divmod(entry + self.lanes, self.entries)
        return epoch + turns, entry

    def locate(self, epoch: int, entry: int) -> tuple[int, int]:
        """(index into `files`, share) of an entry."""
        share, place = divmod(entry, len(self.files))
        return self._epoch(epoch)[place], share

    def rows(self, epoch: int, file: int, share: int, block: int, size: int) -> np.ndarray:
        """Shuffled order of the `size` rows of a block, (size,)."""
        return _permuted(size, "rows", self.seed, epoch, source_name(self.files[file]), share, block)

    def _epoch(self, epoch: int) -> list[int]:
        order = self._epochs.get(epoch)
        if order is None:
            order = permutation(len(self.files), "files", self.seed, epoch)
            if len(self._epochs) > 16:
                self._epochs.clear()
            self._epochs[epoch] = order
        return order


class Lane:
    """Documents of one lane. `shared` is the process's reader of files that several lanes read."""

    def __init__(self, order: Order, lane: int, shared: SharedFiles | SharedShards, *, retry_budget: float):
        self._order, self._lane, self._shared = order, lane, shared
        self._retry_budget = retry_budget

    def documents(self, start: Cursor) -> Iterator[tuple[Cursor, str]]:
        """(cursor with offset 0, text) from the document of `start` on, endlessly; not of prepared shards.

        Raises DataError when a file cannot be read or parsed, when the document of `start` is not there
        any more, or when the lane meets no document in as many entries as an epoch has.
        """
        for cursor, url, waiting in self._blocks(start):
            assert isinstance(waiting, list)
            index = cursor.index
            while waiting:
                yield replace(cursor, index=index), _text(url, waiting.pop())
                index += 1

    def chunks(self, start: Cursor, encoder: Encoder, *, whole_blocks: bool = False) -> Iterator[Chunk]:
        """The tokens of these documents, of prepared shards too: as many at a time as can be had at once.

        With `whole_blocks` a chunk is the rest of a block. Raises DataError as `documents` does.
        """
        if isinstance(self._shared, SharedShards):
            limit = None if whole_blocks else PART
            for cursor, _, rows in self._blocks(start):
                assert isinstance(rows, ShardRows)
                for first, tokens, ends in rows.parts(limit):
                    yield Chunk(replace(cursor, index=cursor.index + first) if first else cursor, tokens, ends)
        elif whole_blocks:
            for cursor, url, waiting in self._blocks(start):
                assert isinstance(waiting, list)
                parts = [document_tokens(encoder, _text(url, row)) for row in reversed(waiting)]
                if parts:
                    yield Chunk(cursor, np.concatenate(parts), np.cumsum([len(part) for part in parts]))
        else:
            for cursor, text in self.documents(start):
                tokens = document_tokens(encoder, text)
                yield Chunk(cursor, tokens, np.array([len(tokens)]))

    def _blocks(self, start: Cursor) -> Iterator[tuple[Cursor, str, list[Row] | ShardRows]]:
        """(cursor of the next row, file, rows from there on) of each block; a list has the next row last."""
        order, size = self._order, self._order.shuffle_block
        epoch, entry, block, index = start.epoch, start.entry, start.block, start.index
        resumed = start != Cursor(epoch, entry, 0, 0, 0)
        barren, found = 0, resumed
        self._own: FileRows | None = None
        while barren <= order.entries:
            file, share = order.locate(epoch, entry)
            url = order.files[file]
            first = share + block * size * order.shares
            wanted = range(first, first + size * order.shares, order.shares)
            rows = self._take(url, wanted)
            if resumed and index >= len(rows):
                raise DataError(
                    f"{url}: changed since the checkpoint, it has no row {wanted[index] + 1} any more; "
                    "put the old file back, or start a new run"
                )
            resumed = False
            shuffled = order.rows(epoch, file, share, block, len(rows))[index:]
            if isinstance(rows, ShardRows):
                waiting = rows.pick(shuffled)
                found = found or waiting.has_tokens()
            else:
                waiting = [rows[place] for place in reversed(shuffled)]
                found = found or bool(rows)
            last = len(rows) < size
            del rows
            yield Cursor(epoch, entry, block, index, 0), url, waiting
            index, block = 0, block + 1
            if last:
                epoch, entry = order.following(epoch, entry)
                barren, found = 0 if found else barren + 1, False
                block, self._own = 0, None
        raise DataError(
            f"data.lanes: lane {self._lane} of {order.lanes} finds no document in its share of "
            f"{len(order.files)} file(s); use fewer lanes or more documents"
        )

    def _take(self, url: str, wanted: range) -> list[Row] | ShardRows:
        shared = self._shared
        if isinstance(shared, SharedShards):
            return shared.take(url, wanted)
        rows = shared.take(url, wanted) if self._order.shares > 1 and self._own is None else None
        if rows is None:
            self._own = self._own or FileRows(url, room=0, retry_budget=self._retry_budget)
            rows = self._own.take(wanted)
            assert rows is not None  # a lane reads its own file forward only
        return rows


def _text(url: str, row: Row) -> str:
    number, line = row
    return document_text(line, url=url, number=number)
