"""The text of a compressed file in pieces, from its start or from a seek point in the middle."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stablelm.data.formats import seek_points
from stablelm.data.formats.seek_points import SeekIndex, SeekPoint
from stablelm.data.storage.options import base_name
from stablelm.data.storage.range_file import RangeFile
from stablelm.data.storage.retry import words
from stablelm.errors import DataError

# Slices of a file in which the start of a block is looked for before the search is given up until later.
TRIES = 16
# Bytes of text that a zstandard frame may refer back to, which are held in memory: all that `zstd --long=31` asks for.
LARGEST_WINDOW = 1 << 31
# A gzip header holds a name and a comment.
LONGEST_HEADER = 1 << 20
# Compressed bytes of a zstandard frame that are inflated at once, most and least, and what counts as much text.
FEW, FEWEST, MUCH = 8 << 10, 16, 1 << 20


class Damaged(DataError):
    """What a file holds cannot be inflated."""


@dataclass(frozen=True)
class BlockStart:
    """A `SeekPoint` as far as the inflater knows it, `ahead` inflated bytes before the current position."""

    bit: int
    ahead: int = 0
    crc: int = 0
    size: int = 0
    packed: bytes = b""


class SeekPointFinder:
    """Collects the starts that an inflater finds; each is added to the index when its first row is known."""

    def __init__(self, places: SeekIndex):
        self._index = places
        self._found: BlockStart | None = None
        self._passed = 0
        self._tries = 0
        self._resting = 0

    def due(self, byte: int) -> bool:
        """Whether a start at this byte of the file is wanted."""
        return self._found is None and byte >= self._resting and self._index.due(8 * byte)

    def offer(self, start: BlockStart) -> None:
        """A start at or before the end of the text handed on so far."""
        self._found, self._passed, self._tries = start, start.ahead, 0

    def failed(self, byte: int) -> None:
        """No start was found here; too many such searches in a row end them for a while."""
        self._tries += 1
        if self._tries == TRIES:
            self._tries, self._resting = 0, byte + seek_points.SPACING

    def passed(self, size: int, first: int | None, row: int, line: int) -> None:
        """A piece of `size` bytes is over; row `row` (from 0), after line `line`, begins `first` bytes into it."""
        found = self._found
        if found is None:
            return
        if first is None:
            self._passed += size
            return
        self._found = None
        skip = self._passed + first
        self._index.add(SeekPoint(found.bit, row, line, skip, found.crc, found.size, found.packed))


def pieces(file: RangeFile, place: SeekPoint | None, starts: SeekPointFinder) -> Iterator[bytes]:
    """Text from the seek point `place` (None: the start) on: `.gz` and `.zst` inflated, other files as they are.

    Raises DataError as reading does, and Damaged, naming the file, when it is truncated or of another format.
    """
    file.seek(place.bit // 8 if place else 0)
    name = base_name(file.url)
    errors = (_zstandard(file).ZstdError,) if name.endswith(".zst") else seek_points.ERRORS
    try:
        if name.endswith(".gz"):
            yield from _in_parts(_gunzip(file, place, starts))
        elif name.endswith(".zst"):
            yield from _in_parts(_unzstd(file, starts))
        else:
            yield from _plain(file, starts)
    except Damaged:
        file.forget()
        raise
    except errors as error:
        file.forget()
        raise Damaged(
            f"{file.url}: damaged near byte {file.offset} ({words(error)}); "
            "replace it by an intact copy, then run again"
        ) from error


def _in_parts(texts: Iterator[bytes]) -> Iterator[bytes]:
    """The same text in small pieces: a piece of a million lines would become a million objects."""
    for text in texts:
        if len(text) <= MUCH:
            yield text
        else:
            yield from (text[at : at + MUCH] for at in range(0, len(text), MUCH))


def _plain(file: RangeFile, starts: SeekPointFinder) -> Iterator[bytes]:
    for at, data in file.slices():
        if starts.due(at):
            starts.offer(BlockStart(8 * at))
        yield data


def _gunzip(file: RangeFile, place: SeekPoint | None, starts: SeekPointFinder) -> Iterator[bytes]:
    """Members one after another, zeros between them, from the start of a member or the middle of one."""
    member = _GzipMember(place) if place and place.packed else None
    rest = b""  # a header or trailer of which more must be read
    for at, data in file.slices():
        data, at, rest = rest + data, at - len(rest), b""
        while data:
            if member is None:
                padded, data = len(data), data.lstrip(b"\0")
                at += padded - len(data)
                length = _header_length(data)
                if length is None:
                    if len(data) > LONGEST_HEADER:
                        raise zlib.error("a header without an end")
                    rest = data
                    break
                if starts.due(at):
                    starts.offer(BlockStart(8 * at))
                member = _GzipMember()
                data, at = data[length:], at + length
            elif not member.ended:
                searching = starts.due(at)
                yield member.inflate(data, searching)
                if searching and not member.ended:
                    _search(member, data, at, starts)
                data, at = member.unused, at + len(data) - len(member.unused)
            elif len(data) < 8:
                rest = data
                break
            else:
                member.check(data[:8])
                member, data, at = None, data[8:], at + 8
    if member is not None or rest:
        raise _truncated(file)


def _search(member: "_GzipMember", data: bytes, at: int, starts: SeekPointFinder) -> None:
    block = seek_points.find_block(data, member.tail, member.out)
    crc, size = member.before
    # A window that is too short may do for these bytes and not for later ones.
    if block is None or len(block.window) < min(size + block.before, seek_points.WINDOW):
        starts.failed(at)
        return
    crc = seek_points.crc32(memoryview(member.out)[: block.before], crc)
    ahead = len(member.out) - block.before
    starts.offer(BlockStart(8 * at + block.bit, ahead, crc, size + block.before, zlib.compress(block.window, 1)))


class _GzipMember:
    """One gzip member after its header, from its beginning or from a place inside it.

    `out` is what the last piece inflated to, `before` the checksum and size of all before it, `tail` the end of
    the text before it if a search wants it.
    """

    def __init__(self, place: SeekPoint | None = None):
        self.crc, self.size = (place.crc, place.size) if place else (0, 0)
        self.out = place.window if place else b""
        self.tail, self.before = b"", (self.crc, self.size)
        self.unused = b""
        self._bit = place.bit % 8 if place else 0
        self._inflater = seek_points.inflater_at(self._bit, self.out)

    @property
    def ended(self) -> bool:
        return self._inflater.eof

    def inflate(self, data: bytes, searching: bool) -> bytes:
        """The text that `data` inflates to; its `tail` is only kept for a search."""
        self.tail = (self.tail + self.out)[-seek_points.WINDOW :] if searching else b""
        self.before = self.crc, self.size
        if self._bit:
            data, self._bit = seek_points.padding(self._bit, data[0]) + data[1:], 0
        self.out = self._inflater.decompress(data)
        self.crc = seek_points.crc32(self.out, self.crc)
        self.size += len(self.out)
        self.unused = self._inflater.unused_data
        return self.out

    def check(self, trailer: bytes) -> None:
        """Compares with the checksum and size that end a member."""
        if trailer != self.crc.to_bytes(4, "little") + (self.size % 2**32).to_bytes(4, "little"):
            raise zlib.error("incorrect data check")


def _header_length(data: bytes) -> int | None:
    """Bytes of the gzip header that `data` begins with; None when it goes on beyond them."""
    if not b"\x1f\x8b\x08".startswith(data[:3]):
        raise zlib.error("incorrect header check")
    if len(data) < 12:
        return None
    flags, end = data[3], 10
    if flags & 4:  # extra field
        end += 2 + int.from_bytes(data[10:12], "little")
    for flag in (8, 16):  # name, comment
        if flags & flag:
            end = data.find(b"\0", end) + 1
            if end == 0:
                return None
    end += 2 if flags & 2 else 0  # checksum of the header
    return end if end <= len(data) else None


def _unzstd(file: RangeFile, starts: SeekPointFinder) -> Iterator[bytes]:
    """Frames one after another; reading can begin at each of them."""
    zstandard, frame = _zstandard(file), None
    few = FEW
    for at, data in file.slices():
        begin, text = 0, []
        while begin < len(data):
            if frame is None:
                if starts.due(at + begin):
                    yield b"".join(text)
                    text = []
                    starts.offer(BlockStart(8 * (at + begin)))
                frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            part = data[begin : begin + few]
            text.append(frame.decompress(part))
            begin += len(part) - len(frame.unused_data)
            frame = None if frame.eof else frame
            # Four bytes may stand for 128 KiB: of such text little is inflated at once.
            few = max(few // 16, FEWEST) if len(text[-1]) > MUCH else FEW
            if sum(map(len, text)) > MUCH:
                yield b"".join(text)
                text = []
        yield b"".join(text)
    if frame is not None:
        raise _truncated(file)


def _truncated(file: RangeFile) -> Damaged:
    return Damaged(
        f"{file.url}: truncated, it ends at byte {file.offset} in the middle of its compressed text; "
        "replace it with an intact copy and run again"
    )


def _zstandard(file: RangeFile) -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.url}: needs the package zstandard; run pip install zstandard") from None
    return zstandard
