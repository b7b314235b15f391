"""Places in a file where reading can begin, found while it was read and kept beside other derived files.

An index is a convenience: one that is lost, damaged or cannot be written only costs a slower seek. Each
change writes a new file and renames it, so readers of any number of processes see whole ones; of two
changes at the same moment one may win, and its loss costs no more than a place.
"""

import hashlib
import struct
import uuid
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from stablelm.data.storage.options import Stamp
from stablelm.data.storage.stores import base_name

# Compressed bytes between two places: about 8 MB of text, inflated in less than 0.1 s.
SPACING = 3 << 20
LONGEST_WINDOW = 1 << 15  # of deflate
MAGIC = b"stablelm index 1\n"
_RECORD = struct.Struct("<QQQQIQI")  # bit, row, line, skip, crc, size, bytes of the packed window
_CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class Place:
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


class Index:
    """Places of one content of a file; `folder` None: nothing is known and nothing kept."""

    def __init__(self, folder: str | None, url: str, stamp: Stamp):
        name = base_name(url)
        key = hashlib.sha256(f"{stamp.size} {stamp.tag}".encode()).hexdigest()[:16]
        self._path = None if folder is None else Path(folder) / "index" / f"{name}-{key}.index"
        self._bits: list[int] = []
        self._rows: list[int] = []
        self._learn(self._load())

    def before(self, row: int) -> Place | None:
        """The last place at or before this row."""
        number = bisect_right(self._rows, row) - 1
        if number < 0:
            return None
        bit = self._bits[number]
        return next((place for place in self._load() if place.bit == bit), None)

    def due(self, bit: int) -> bool:
        """Whether a place is wanted here: none is known within SPACING before it, nor from there on as far."""
        if self._path is None or bit < 8 * SPACING:
            return False
        number = bisect_right(self._bits, bit + 8 * SPACING // 2) - 1
        return number < 0 or self._bits[number] <= bit - 8 * SPACING

    def add(self, place: Place) -> None:
        """Keeps a place, beside those that others have kept in the meantime."""
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
            # A folder that cannot be written to: training goes on without.
            self._path = None

    def drop(self) -> None:
        """Forgets an index that proved wrong."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._learn([])

    def _learn(self, places: list[Place]) -> None:
        self._bits = [place.bit for place in places]
        self._rows = [place.row for place in places]

    def _load(self) -> list[Place]:
        if self._path is None:
            return []
        try:
            data = self._path.read_bytes()
        except OSError:
            return []
        return _unpacked(data)


def _packed(place: Place) -> bytes:
    numbers = (place.bit, place.row, place.line, place.skip, place.crc, place.size, len(place.packed))
    record = _RECORD.pack(*numbers) + place.packed
    return record + _CHECK.pack(zlib.crc32(record))


def _unpacked(data: bytes) -> list[Place]:
    """Places of an index file, in order; none when it is damaged anywhere."""
    if not data.startswith(MAGIC):
        return []
    places, at = [], len(MAGIC)
    try:
        while at < len(data):
            bit, row, line, skip, crc, size, length = _RECORD.unpack_from(data, at)
            end = at + _RECORD.size + length
            if _CHECK.unpack_from(data, end)[0] != zlib.crc32(memoryview(data)[at:end]):
                return []
            places.append(Place(bit, row, line, skip, crc, size, data[end - length : end]))
            at = end + _CHECK.size
    except struct.error:
        return []
    return places
