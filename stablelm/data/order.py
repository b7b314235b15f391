"""The order of documents: which document comes next in which lane.

Lane l of Λ reads the entries l, l+Λ, l+2Λ, ... of one endless sequence of entries. An epoch of it is a
keyed permutation of the files; with fewer files than lanes each file counts as S = ceil(Λ/F) entries.
A file's rows are taken in blocks of S * shuffle_block. A keyed permutation mixes the rows of a block and
deals them out in turn: share k gets those at its places k, k+S, k+2S, ... Rows in a file may have a period,
such as every second one empty; lanes that took every S-th row could meet nothing else.
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

from stablelm.data.formats.file_rows import BadRow, FileRows, Row, SharedFiles, document_text
from stablelm.data.shards.shard_format import source_name
from stablelm.data.storage.options import ReadOptions
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

    def cursor(self) -> "Cursor":
        """Itself, as of any place."""
        return self


@dataclass(frozen=True)
class Group:
    """Consecutive rows of a block, the first one at `cursor` (offset 0): their documents, None for one left out.

    `wrong` says what is wrong with the row after them. `skipped` of the rows left out are bad ones; of groups that
    are no whole blocks such a row is the last.
    """

    cursor: Cursor
    texts: list[str | None]
    wrong: DataError | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of an entry, the first one at `cursor` (offset 0).

    `tokens` (n,) are theirs, eos of each included; `ends` (documents,) int64 says where each ends in `tokens`.
    Where they are of several blocks, all but the last block have `block_rows` rows. `skipped`: as in `Group`.
    """

    cursor: Cursor
    tokens: np.ndarray
    ends: np.ndarray
    block_rows: int = sys.maxsize
    skipped: int = 0


class Place(NamedTuple):
    """Token `position` of a chunk with this cursor and these ends; cheaper to keep than the cursor it stands for."""

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
        """Epochs that the cursor's lane has behind it; an entry that it is in the middle of counts as unread."""
        return cursor.epoch + cursor.entry // self.lanes * self.lanes / self.entries

    def locate(self, epoch: int, entry: int) -> tuple[int, int]:
        """(index into `files`, share) of an entry."""
        share, place = divmod(entry, len(self.files))
        return self._epoch(epoch)[place], share

    @property
    def block_rows(self) -> int:
        """Rows of a file that its shares take from one block together."""
        return self.shuffle_block * self.shares

    def block(self, block: int, blocks: int = 1) -> range:
        """Numbers of a file's rows in so many blocks, from `block` on."""
        return range(block * self.block_rows, (block + blocks) * self.block_rows)

    def dealt(self, epoch: int, file: int, share: int, block: int, size: int) -> np.ndarray:
        """Places of a share's rows, in its order, in a block in which the file has `size` rows, (rows of it,)."""
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


class Entries:
    """The entries of a lane, one after the other and endlessly; `found` is set once one has given a document."""

    def __init__(self, order: Order, lane: int):
        self._order, self._lane = order, lane
        self.found = False

    def walk(self, start: Cursor) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, entry, block, index) at which to begin in each entry, from that of `start` on.

        Raises DataError when no document is found in as many entries as an epoch has.
        """
        epoch, entry, block, index = start.epoch, start.entry, start.block, start.index
        barren, entries = 0, self._order.entries
        self.found = is_inside(start)
        while barren <= entries:
            yield epoch, entry, block, index
            barren = 0 if self.found else barren + 1
            self.found = False
            epoch, entry = self._order.following(epoch, entry)
            block = index = 0
        raise DataError(
            f"data.lanes: lane {self._lane} of {self._order.lanes} finds no document in its share of "
            f"{len(self._order.files)} file(s); use fewer lanes or more documents"
        )


def is_inside(cursor: Cursor) -> bool:
    """Whether some of the cursor's entry has been read already."""
    return (cursor.block, cursor.index, cursor.offset) != (0, 0, 0)


def row_is_gone(url: str, row: int) -> DataError:
    """What is raised when a checkpoint lies in row number `row` (from 0), which the file does not have."""
    return DataError(
        f"{url}: changed since the checkpoint, it has no row {row + 1} any more; "
        "put the old file back, or start a new run"
    )


class Lane:
    """Documents of one lane. `shared` is the process's reader of files that several lanes read."""

    def __init__(self, order: Order, lane: int, shared: SharedFiles, *, options: ReadOptions):
        self._order, self._lane, self._shared = order, lane, shared
        self._options = options

    def documents(self, start: Cursor) -> Iterator[tuple[Cursor, str]]:
        """(cursor with offset 0, text) from the document of `start` on, endlessly; rows without text are passed over.

        Raises DataError when a file cannot be read or parsed, when the document of `start` is not there
        any more, or when the lane meets no document in as many entries as an epoch has.
        """
        for group in self.groups(start):
            for place, text in enumerate(group.texts, group.cursor.index):
                if text:
                    yield replace(group.cursor, index=place), text
            if group.wrong is not None:
                raise group.wrong

    def groups(self, start: Cursor, counts: Iterator[int] | None = None) -> Iterator[Group]:
        """The rows from the document of `start` on, by so many at a time, or (None) the rest of a block.

        Raises DataError as `documents` does, but for a row that is wrong: that ends the groups with the last one.
        """
        entries = Entries(self._order, self._lane)
        for cursor, url, waiting in self._blocks(start, entries):
            index = cursor.index
            while waiting:
                group = self._group(replace(cursor, index=index), url, waiting, next(counts) if counts else None)
                entries.found = entries.found or any(map(_has_text, group.texts))
                yield group
                if group.wrong is not None:
                    return
                index += len(group.texts)

    def _group(self, cursor: Cursor, url: str, waiting: list[Row], count: int | None) -> Group:
        """Of the next rows, which are taken from `waiting`: up to `count`, or (None) all."""
        column, skip = self._options.text_column, self._options.bad_rows == "skip"
        texts: list[str | None] = []
        skipped = 0
        while waiting and (count is None or len(texts) < count):
            try:
                texts.append(document_text(waiting.pop(), url=url, column=column))
            except BadRow as error:
                if not skip:
                    return Group(cursor, texts, error, skipped)
                texts.append(None)
                skipped += 1
                if count is not None:
                    break
        return Group(cursor, texts, None, skipped)

    def _blocks(self, start: Cursor, entries: Entries) -> Iterator[tuple[Cursor, str, list[Row]]]:
        """(cursor of the next row, file, rows from there on with the next one last) of each block."""
        order, size = self._order, self._order.shuffle_block
        resumed = is_inside(start)
        for epoch, entry, block, index in entries.walk(start):
            file, share = order.locate(epoch, entry)
            url, own, last = order.files[file], None, False
            while not last:
                wanted, dealt = order.block(block), partial(order.dealt, epoch, file, share, block)
                rows = self._shared.take(url, wanted, dealt) if order.shares > 1 and own is None else None
                if rows is None:
                    own = own or FileRows(url, room=0, options=self._options)
                    rows = own.take(wanted, dealt)
                    assert rows is not None  # a lane reads its own file forward only
                if resumed and index >= len(rows):
                    raise row_is_gone(url, wanted.start + share + index * order.shares)
                resumed, last = False, len(rows) < size
                rows.reverse()
                del rows[len(rows) - index :]
                yield Cursor(epoch, entry, block, index, 0), url, rows
                index, block = 0, block + 1


def _has_text(text: str | None) -> bool:
    return bool(text) and not text.isspace()
