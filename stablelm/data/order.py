"""The order of documents: which document comes next in which lane.

Lane l of Λ reads the entries l, l+Λ, l+2Λ, ... of one endless sequence of entries. An epoch of it is a
keyed permutation of the files; with fewer files than lanes each file counts as S = ceil(Λ/F) entries.
A file's rows are taken in blocks of S * shuffle_block. A keyed permutation mixes the rows of a block and
deals them out in turn: share k gets those at the positions k, k+S, k+2S, ... Rows may have a period,
such as every second one empty, so no lane takes every S-th row.
Nothing here knows of ranks or workers, and keys hold base names only (of a prepared shard: its source's),
so data may move, and be prepared, at any time. A row keeps its number whether it holds a document or not.

Keyed permutation: the SHAKE-256 stream of the key gives each item a 64-bit number, and a stable sort by
it gives the order. It depends on neither platform nor library version.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from stablelm.data.formats.file_rows import BadRow, FileRow, FileRows, SharedFiles, document_text
from stablelm.data.shards.shard_format import source_name
from stablelm.data.shards.shard_reader import PART, SharedShards, TokenShard
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError

BLOCKS = 8  # blocks of a shard whose rows are looked up at once


@dataclass(frozen=True)
class Cursor:
    """A position in a lane: row `index` (in shuffled order) of block `block` of an entry of an epoch.

    `offset` counts the tokens of that document, its eos included, which have been inputs already.
    """

    epoch: int
    entry: int
    block: int
    index: int
    offset: int

    def to_list(self) -> list[int]:
        return list(astuple(self))

    def cursor(self) -> "Cursor":
        """Itself, as of any position."""
        return self


@dataclass(frozen=True)
class DocumentGroup:
    """Consecutive rows of a block, the first one at `cursor` (offset 0): their documents, None for an excluded one.

    `wrong` is the error of the row after them. `skipped` of the excluded rows are bad ones; in a group
    that is not a whole block such a row is the last.
    """

    cursor: Cursor
    texts: list[str | None]
    wrong: DataError | None = None
    skipped: int = 0


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive documents of an entry, the first one at `cursor` (offset 0).

    `tokens` (n,) are theirs, eos of each included; `ends` (documents,) int64 says where each ends in `tokens`.
    Where they are of several blocks, all but the last block have `block_rows` rows. `skipped`: as in `DocumentGroup`.
    """

    cursor: Cursor
    tokens: np.ndarray
    ends: np.ndarray
    block_rows: int = sys.maxsize
    skipped: int = 0


class TokenPosition(NamedTuple):
    """Token `position` of a chunk with this cursor and these ends; cheaper to make than its cursor."""

    start: Cursor
    ends: np.ndarray
    block_rows: int
    position: int

    def cursor(self) -> Cursor:
        """The document that holds the token, and how many of its tokens come before."""
        start, document = self.start, int(self.ends.searchsorted(self.position, "right"))
        begin = int(self.ends[document - 1]) if document else 0
        blocks, index = divmod(start.index + document, self.block_rows)
        return Cursor(start.epoch, start.entry, start.block + blocks, index, self.position - begin)


def permutation(size: int, *key: int | str) -> list[int]:
    """A permutation of range(size) determined by the key alone; see the module's text."""
    return _permuted(size, *key).tolist()


def _permuted(size: int, *key: int | str) -> np.ndarray:
    stream = hashlib.shake_256("\0".join(map(str, key)).encode()).digest(8 * size)
    return np.frombuffer(stream, "<u8").argsort(kind="stable")


class Order:
    """The endless sequence of entries over `files` for `lanes` lanes: pure arithmetic, no reading."""

    def __init__(self, files: list[str], *, seed: int | str, lanes: int, shuffle_block: int):
        assert files
        self.files = sorted(files, key=source_name)
        self.seed = seed
        self.lanes = lanes
        self.shuffle_block = shuffle_block
        self.shares = -(-lanes // len(files)) if len(files) < lanes else 1
        self.entries = len(files) * self.shares
        self._epochs: dict[int, list[int]] = {}
        # The lanes of a file take the same blocks at about the same time.
        self._mixed = lru_cache(16 * len(files) + 8)(self._mix)

    def start(self, lane: int) -> Cursor:
        """Where a lane begins."""
        return Cursor(0, lane, 0, 0, 0)

    def following(self, epoch: int, entry: int) -> tuple[int, int]:
        """(epoch, entry) that the lane of this entry takes next."""
        turns, entry = divmod(entry + self.lanes, self.entries)
        return epoch + turns, entry

    def turns(self, cursor: Cursor) -> float:
        """Epochs that the cursor's lane has finished; an entry that is not finished counts as unread."""
        return cursor.epoch + cursor.entry // self.lanes * self.lanes / self.entries

    def locate(self, epoch: int, entry: int) -> tuple[int, int]:
        """(index into `files`, share) of an entry."""
        share, place = divmod(entry, len(self.files))
        return self._epoch(epoch)[place], share

    @property
    def block_rows(self) -> int:
        """Rows of a file that its shares take from one block, in total."""
        return self.shuffle_block * self.shares

    def block(self, block: int) -> range:
        """Numbers of a file's rows in a block."""
        return range(block * self.block_rows, (block + 1) * self.block_rows)

    def dealt(self, epoch: int, file: int, share: int, block: int, size: int) -> np.ndarray:
        """Positions of a share's rows, in its order, in a block in which the file has `size` rows, (rows of it,)."""
        name = source_name(self.files[file])
        mixed = self._mix(epoch, name, block, size) if self.shares == 1 else self._mixed(epoch, name, block, size)
        return mixed[share :: self.shares]

    def _mix(self, epoch: int, name: str, block: int, size: int) -> np.ndarray:
        return _permuted(size, "rows", self.seed, epoch, name, 0, block)

    def _epoch(self, epoch: int) -> list[int]:
        order = self._epochs.get(epoch)
        if order is None:
            order = permutation(len(self.files), "files", self.seed, epoch)
            if len(self._epochs) > 16:
                self._epochs.clear()
            self._epochs[epoch] = order
        return order


class LaneEntries:
    """The entries of a lane from `start` on, endlessly; `found` is set once one has given a document."""

    def __init__(self, order: Order, lane: int, start: Cursor):
        self._order, self._lane = order, lane
        self._start: Cursor | None = Cursor(start.epoch, start.entry, start.block, start.index, 0)
        self._epoch, self._entry = start.epoch, start.entry
        self._barren = 0  # entries in a row without a document
        self.found = is_inside(start)

    def next_entry(self) -> Cursor:
        """Where to begin in the next entry, with offset 0; in the first one at `start`.

        Raises DataError when no document is found in as many entries as an epoch has.
        """
        if self._start is not None:
            cursor, self._start = self._start, None
            return cursor
        self._barren = 0 if self.found else self._barren + 1
        self.found = False
        if self._barren > self._order.entries:
            raise DataError(
                f"data.lanes: lane {self._lane} of {self._order.lanes} has no document in its share of "
                f"{len(self._order.files)} file(s); use fewer lanes or more documents"
            )
        self._epoch, self._entry = self._order.following(self._epoch, self._entry)
        return Cursor(self._epoch, self._entry, 0, 0, 0)


def is_inside(cursor: Cursor) -> bool:
    """Whether some of the cursor's entry has been read already."""
    return (cursor.block, cursor.index, cursor.offset) != (0, 0, 0)


def missing_row(url: str, row: int) -> DataError:
    """What is raised when a checkpoint's position is in row number `row` (from 0), which the file does not have."""
    return DataError(
        f"{url}: changed since the checkpoint: row {row + 1} no longer exists; "
        "put the old file back, or start a new run"
    )


class TextLane:
    """Documents of one lane from `start` on, endlessly. `shared` reads the files that several lanes need.

    Methods raise DataError when a file cannot be read or parsed, when the document of `start` does not exist any
    more, or when the lane meets no document in as many entries as an epoch has.
    """

    def __init__(self, order: Order, lane: int, start: Cursor, shared: SharedFiles, *, options: ReadOptions):
        self._order, self._shared, self._options = order, shared, options
        self._entries = LaneEntries(order, lane, start)
        self._resumed = is_inside(start)
        self._cursor = start  # of the next row, but for its index, once a block has been read
        self._index = 0
        self._waiting: list[FileRow] = []  # the rest of the block, the next row last
        self._entry_ended = True
        self._own: FileRows | None = None  # of the entry's file, where it is not read with others

    def documents(self) -> Iterator[tuple[Cursor, str]]:
        """(cursor with offset 0, text) of each document; rows without text are passed over."""
        while True:
            group = self.next_group()
            for index, text in enumerate(group.texts, group.cursor.index):
                if text:
                    yield replace(group.cursor, index=index), text
            if group.wrong is not None:
                raise group.wrong

    def next_group(self, count: int | None = None) -> DocumentGroup:
        """The next rows of a block, up to `count`, or (None) the rest of it.

        A row that is wrong is not raised: it ends the group, which is the last one.
        """
        while not self._waiting:
            self._next_block()
        group = self._take(count)
        self._index += len(group.texts)
        self._entries.found = self._entries.found or any(map(_has_text, group.texts))
        return group

    def _take(self, count: int | None) -> DocumentGroup:
        cursor, column = replace(self._cursor, index=self._index), self._options.text_column
        skip, url = self._options.bad_rows == "skip", self._order.files[self._file]
        texts: list[str | None] = []
        skipped = 0
        while self._waiting and (count is None or len(texts) < count):
            try:
                texts.append(document_text(self._waiting.pop(), url=url, column=column))
            except BadRow as error:
                if not skip:
                    return DocumentGroup(cursor, texts, error, skipped)
                texts.append(None)
                skipped += 1
                if count is not None:
                    break
        return DocumentGroup(cursor, texts, None, skipped)

    def _next_block(self) -> None:
        if self._entry_ended:
            self._cursor, self._own = self._entries.next_entry(), None
            self._index = self._cursor.index
            self._file, self._share = self._order.locate(self._cursor.epoch, self._cursor.entry)
        else:
            self._cursor, self._index = replace(self._cursor, block=self._cursor.block + 1), 0
        rows = self._read_block()
        if self._resumed and self._index >= len(rows):
            first = self._order.block(self._cursor.block).start
            raise missing_row(self._order.files[self._file], first + self._share + self._index * self._order.shares)
        self._resumed, self._entry_ended = False, len(rows) < self._order.shuffle_block
        rows.reverse()
        del rows[len(rows) - self._index :]
        self._waiting = rows

    def _read_block(self) -> list[FileRow]:
        """The share's rows of the block, in its order."""
        order, cursor, url = self._order, self._cursor, self._order.files[self._file]
        wanted = order.block(cursor.block)
        dealt = partial(order.dealt, cursor.epoch, self._file, self._share, cursor.block)
        if order.shares > 1 and self._own is None:
            rows = self._shared.take(url, wanted, dealt)
            if rows is not None:
                return rows
        self._own = self._own or FileRows(url, room=0, options=self._options)
        rows = self._own.take(wanted, dealt)
        assert rows is not None  # a lane reads its own file forward only
        return rows


def _has_text(text: str | None) -> bool:
    return bool(text) and not text.isspace()


class ShardLane:
    """Tokens of one lane over prepared shards from `start` on, endlessly: the order of a `TextLane`.

    With `whole_blocks` a chunk is the rest of a block. `shared` holds the open shards of the process.
    """

    def __init__(self, order: Order, lane: int, start: Cursor, shared: SharedShards, *, whole_blocks: bool = False):
        self._order, self._shared = order, shared
        self._blocks, self._limit = (1, None) if whole_blocks else (BLOCKS, PART)
        self._entries = LaneEntries(order, lane, start)
        self._resumed = is_inside(start)
        self._cursor = start  # of the first row that was looked up last
        self._entry_ended = True
        self._parts: Iterator[tuple[int, np.ndarray, np.ndarray]] = iter(())

    def next_chunk(self) -> TokenChunk:
        """The tokens of the next documents.

        Raises DataError when a shard cannot be read, is damaged or of another tokenizer, when the document of
        `start` does not exist any more, or when the lane meets no document in as many entries as an epoch has.
        """
        while (part := next(self._parts, None)) is None:
            self._next_blocks()
        first, tokens, ends = part
        self._entries.found = self._entries.found or len(tokens) > 0
        at = self._cursor
        cursor = Cursor(at.epoch, at.entry, at.block, at.index + first, 0)
        return TokenChunk(cursor, tokens, ends, self._order.shuffle_block)

    def _next_blocks(self) -> None:
        order = self._order
        if self._entry_ended:
            self._cursor = self._entries.next_entry()
            self._file, self._share = order.locate(self._cursor.epoch, self._cursor.entry)
        else:
            self._cursor = replace(self._cursor, block=self._cursor.block + self._blocks, index=0)
        shard, block, index = self._shared.shard(order.files[self._file]), self._cursor.block, self._cursor.index
        numbers = np.concatenate([self._numbers(shard, block + each) for each in range(self._blocks)])
        if self._resumed and index >= len(numbers):
            raise missing_row(shard.url, order.block(block).start + self._share + index * order.shares)
        self._resumed, self._entry_ended = False, len(numbers) < order.shuffle_block * self._blocks
        self._parts = shard.take(numbers[index:]).parts(self._limit)

    def _numbers(self, shard: TokenShard, block: int) -> np.ndarray:
        """Numbers of a share's rows of a block, in its order, (rows,)."""
        rows = self._order.block(block)
        count = max(0, min(rows.stop, shard.footer.rows) - rows.start)
        return self._order.dealt(self._cursor.epoch, self._file, self._share, block, count) + rows.start
