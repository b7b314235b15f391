"""Seek points: positions in a file at which reading can begin, found while it was read and kept in an index.

zlib does not report where blocks begin. A block of Huffman codes has a header whose numbers must fit together, so numpy
finds the few bits that may begin one, and inflating from there shows which do: from a true start the same bytes come
out that the whole stream gave. rapidgzip 0.16.2 and indexed_gzip 1.10.3 do not verify what follows a seek: of 30 files
with a flipped bit there, 21 and 30 gave wrong text without an error; of 30 truncated ones, 10 and 30 gave no error.

An index is a convenience: one that is lost, damaged or cannot be written only costs a slower seek. Each
change writes a new file and renames it, so readers of any number of processes see whole ones; of two
changes at the same moment one may win, and the other costs no more than a seek point.
"""

import hashlib
import struct
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelm.data.storage.options import Stamp, base_name

try:  # inflates more than twice as fast; there is none for some processors
    from isal import isal_zlib

    inflating: Any = isal_zlib
except ImportError:
    inflating = zlib


# Compressed bytes between two places: about 8 MB of text, inflated in less than 0.1 s.
SPACING = 3 << 20
LONGEST_WINDOW = 1 << 15  # of deflate
MAGIC = b"stablelm index 1\n"
_RECORD = struct.Struct("<QQQQIQI")  # bit, row, line, skip, crc, size, bytes of the packed window
_CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class SeekPoint:
    """Reading begins `bit` bits into the file, after `window`, the inflated text before it (`packed` by zlib).

    Row `row` (from 0), which is line `line`+1 or a later one, begins `skip` inflated bytes further on.
    `crc` and `size` are of the gzip member so far. Without a window a member, frame or plain text begins here.
    """

    bit: int
    row: int
    line: int
    skip: int
    crc: int
    size: int
    packed: bytes

    @property
    def window(self) -> bytes:
        """Empty where it is damaged, which the text that follows then shows."""
        try:
            return zlib.decompressobj().decompress(self.packed, LONGEST_WINDOW) if self.packed else b""
        except zlib.error:
            return b""


class SeekIndex:
    """The seek points of one content of a file; with `folder` None nothing is kept."""

    def __init__(self, folder: str | None, url: str, stamp: Stamp):
        name = base_name(url)
        key = hashlib.sha256(f"{stamp.size} {stamp.tag}".encode()).hexdigest()[:16]
        self._path = None if folder is None else Path(folder) / "index" / f"{name}-{key}.index"
        self._bits: list[int] = []
        self._rows: list[int] = []
        self._learn(self._load())

    def before(self, row: int) -> SeekPoint | None:
        """The last seek point at or before this row."""
        number = bisect_right(self._rows, row) - 1
        if number < 0:
            return None
        bit = self._bits[number]
        return next((place for place in self._load() if place.bit == bit), None)

    def due(self, bit: int) -> bool:
        """Whether a seek point is needed here: none is known within SPACING before or after it."""
        if self._path is None or bit < 8 * SPACING:
            return False
        number = bisect_right(self._bits, bit + 8 * SPACING // 2) - 1
        return number < 0 or self._bits[number] <= bit - 8 * SPACING

    def add(self, place: SeekPoint) -> None:
        """Keeps a seek point, beside those that other processes have kept in the meantime."""
        if self._path is None:
            return
        places = {known.bit: known for known in self._load()} | {place.bit: place}
        places = [places[bit] for bit in sorted(places)]
        self._learn(places)
        temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(MAGIC + b"".join(map(_packed, places)))
            temporary.replace(self._path)
        except OSError:
            # A folder that cannot be written to: training continues without.
            self._path = None

    def drop(self) -> None:
        """Deletes an index that proved wrong."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._learn([])

    def _learn(self, places: list[SeekPoint]) -> None:
        self._bits = [place.bit for place in places]
        self._rows = [place.row for place in places]

    def _load(self) -> list[SeekPoint]:
        if self._path is None:
            return []
        try:
            data = self._path.read_bytes()
        except OSError:
            return []
        return _unpacked(data)


def _packed(place: SeekPoint) -> bytes:
    numbers = (place.bit, place.row, place.line, place.skip, place.crc, place.size, len(place.packed))
    record = _RECORD.pack(*numbers) + place.packed
    return record + _CHECK.pack(zlib.crc32(record))


def _unpacked(data: bytes) -> list[SeekPoint]:
    """The seek points of an index file, in order; none when it is damaged anywhere."""
    if not data.startswith(MAGIC):
        return []
    places, at = [], len(MAGIC)
    try:
        while at < len(data):
            bit, row, line, skip, crc, size, length = _RECORD.unpack_from(data, at)
            end = at + _RECORD.size + length
            if _CHECK.unpack_from(data, end)[0] != zlib.crc32(memoryview(data)[at:end]):
                return []
            places.append(SeekPoint(bit, row, line, skip, crc, size, data[end - length : end]))
            at = end + _CHECK.size
    except struct.error:
        return []
    return places


crc32 = inflating.crc32
# What inflating bytes that are not a deflate stream raises.
ERRORS: tuple[type[Exception], ...] = (zlib.error, inflating.error)

# Farthest that a deflate stream refers back.
WINDOW = 32 << 10
# Bytes looked through at once.
STEP = 4 << 10
# So many equal bytes cannot come from a false start.
PROOF = 4096
# Part of the space, in 1/128, that a code of this length takes; 0 is none.
SHARE = np.array([0, 64, 32, 16, 8, 4, 2, 1], np.uint16)


class DeflateBlock(NamedTuple):
    """Start of a block: `bit` of the compressed bytes, `before` inflated bytes come ahead of it."""

    bit: int
    before: int
    window: bytes


def find_block(data: bytes, tail: bytes, out: bytes) -> DeflateBlock | None:
    """The first block that begins inside `data`, compressed bytes that inflated to all of `out`.

    `tail`: up to WINDOW inflated bytes of the same stream before `out`. None when no block was found.
    """
    for bit in candidates(data):
        guess = _tried(data, bit, bytes(WINDOW))
        if guess is None or not PROOF <= len(guess) <= len(out):
            continue
        before = len(out) - len(guess)
        window = (tail + out[:before])[-WINDOW:]
        if window and _tried(data, bit, window) == out[before:]:
            return DeflateBlock(bit, before, window)
    return None


def candidates(data: bytes) -> Iterator[int]:
    """Bits of `data`, ascending, at which the header of a dynamic block that is not the last may begin."""
    padded = np.frombuffer(data + bytes(16), np.uint8)
    for start in range(0, len(data), STEP):
        part = padded[start : start + STEP + 16]
        # words[i]: the 64 bits from byte i on
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(part, 8)).view("<u8")[:, 0]
        size = min(STEP, len(data) - start)
        heads = words[:size].astype(np.uint32)[:, None] >> np.arange(8, dtype=np.uint32)  # one for each bit
        bits = np.flatnonzero(heads & 7 == 4)
        heads = heads.ravel()[bits]
        fits = (heads & (31 << 3) <= 29 << 3) & (heads & (31 << 8) <= 29 << 8)
        bits, counts = bits[fits], ((heads[fits] >> 13) & 15) + 4
        yield from (start * 8 + bits[_complete(words, bits + 17, counts)]).tolist()


def _complete(words: np.ndarray, place: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether the codes of the code lengths, `counts` numbers of 3 bits from `place` on, use up their space exactly."""
    lengths = words[place >> 3] >> (place & 7).astype(np.uint64)
    used = np.zeros(len(place), np.uint16)
    for index in range(19):
        length = (lengths >> np.uint64(3 * index)) & 7
        used += SHARE[length] * (index < counts)
    return used == 128


def _tried(data: bytes, bit: int, window: bytes) -> bytes | None:
    inflater = inflater_at(bit % 8, window)
    try:
        out = inflater.decompress(padding(bit % 8, data[bit // 8]))
        out += inflater.decompress(memoryview(data)[bit // 8 + 1 :])
    except ERRORS:
        return None
    return None if inflater.eof else out


def inflater_at(bit: int, window: bytes):
    """An inflater for the middle of a stream; its first bytes must be `padding(bit, first byte)`."""
    raw = -zlib.MAX_WBITS
    return inflating.decompressobj(raw, zdict=window) if window else inflating.decompressobj(raw)


def padding(bit: int, first: int) -> bytes:
    """Blocks without content that end `bit` bits into a byte, whose other bits are those of `first`."""
    value, length = _empty_blocks(bit)
    whole = length // 8
    last = value >> (8 * whole) | first >> bit << bit
    return (value & ((1 << 8 * whole) - 1)).to_bytes(whole, "little") + bytes([last])


@cache
def _empty_blocks(bit: int) -> tuple[int, int]:
    """Bits, as a number whose lowest bit comes first, and how many; congruent `bit` modulo 8."""
    value = length = 0
    if bit % 2:
        value, length = _odd_block()
    while length % 8 != bit:
        # Fixed codes and at once the end of the block: 10 bits.
        value |= 0b10 << length
        length += 10
    return value, length


def _odd_block() -> tuple[int, int]:
    """An empty block of 95 bits: one with codes of its own, of which only the end of the block is used."""
    code_lengths = {18: 1, 0: 2, 1: 2}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    fields = [(0, 1), (2, 2), (0, 5), (0, 5), (15, 4), *((code_lengths.get(symbol, 0), 3) for symbol in order)]
    # 138 and 118 symbols without a code, then length 1 for the end of the block and 0 for the distance.
    fields += [(0, 1), (138 - 11, 7), (0, 1), (118 - 11, 7), (0b11, 2), (0b01, 2), (0, 1)]
    value = length = 0
    for field, width in fields:
        value |= field << length
        length += width
    return value, length
