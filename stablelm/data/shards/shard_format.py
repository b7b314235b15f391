"""Prepared shards: the tokens of one source file in one file, row by row in the same order.

Layout, little-endian: the tokens of all rows, eos after each (uint16, or uint32 for more than 65,535
pieces), zeros up to a multiple of 8, the end of each row counted in tokens (uint64), the CRC-32 of each
64 KiB of all that (uint32; not in version 1), a footer in JSON, and a tail of 16 bytes: the footer's length
(uint64) and a magic word. A mask beside it (`.mask`) has one
bit a row, lowest bit first; a row whose bit is 1 is left out, which is the same as a row without tokens.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import IO, Annotated, Protocol

import numpy as np
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.data.storage.stores import base_name
from stablelm.errors import DataError
from stablelm.json_text import Count, parse

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

SUFFIX, MASK = ".tokens", ".mask"
VERSION = 2
UNCHECKED = 1  # the version without checksums, which is still read
MAGIC = b"LMTOKENS"
TAIL = struct.Struct("<Q8s")
BLOCK = 1 << 16  # bytes of a checksum
LONGEST_FOOTER = 1 << 16
LARGEST_SMALL = 65_535  # pieces whose ids fit 16 bits
MAKE = "make it again with data/prepare.py"


class Content(Protocol):
    """Bytes of a shard, wherever it lies. `size`: all of them."""

    size: int

    def read(self, start: int, stop: int) -> bytes | memoryview: ...

    def unchanged(self) -> None: ...


def is_shard(url: str) -> bool:
    """Whether a file is a prepared shard, by its name."""
    return base_name(url).endswith(SUFFIX)


def source_name(url: str) -> str:
    """Base name of a file of text, whether it is given itself or as its shard."""
    return base_name(url).removesuffix(SUFFIX)


def mask_url(url: str) -> str:
    """Where the mask of a shard lies, if it has one."""
    head, mark, query = url.partition("?")
    return head.removesuffix(SUFFIX) + MASK + mark + query


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself. `text_bytes`: UTF-8 bytes of its documents; `sha256`: of all before the footer."""

    version: int
    source: str
    source_size: int
    tokenizer: str
    pieces: int
    eos: int
    rows: int
    tokens: int
    text_bytes: int
    sha256: str

    @property
    def dtype(self) -> np.dtype:
        return token_type(self.pieces)

    @property
    def index(self) -> int:
        """Byte at which the ends of the rows begin."""
        return -(-self.tokens * self.dtype.itemsize // 8) * 8

    @property
    def sums(self) -> int:
        """Byte at which the rows end, and the checksums begin."""
        return self.index + 8 * self.rows

    @property
    def start(self) -> int:
        """Byte at which the footer begins."""
        return self.sums + (0 if self.version == UNCHECKED else 4 * -(-self.sums // BLOCK))


class _Version(TypedDict):
    version: int


class _Footer(TypedDict):
    """A footer as it is read."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    version: int
    source: Annotated[str, Field(max_length=4096, pattern=r"^[^/]+$")]
    source_size: Count
    tokenizer: str
    pieces: Annotated[int, Field(ge=1, lt=2**31)]
    eos: Count
    rows: Count
    tokens: Count
    text_bytes: Count
    sha256: str


def token_type(pieces: int) -> np.dtype:
    return np.dtype("<u2" if pieces <= LARGEST_SMALL else "<u4")


def write(
    file: IO[bytes],
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    source: str,
    source_size: int,
    tokenizer: str,
    pieces: int,
    eos: int,
) -> Footer:
    """Writes a shard of `documents`: (tokens with eos, bytes of the text) of each row, in order."""
    content, kind = _Written(file), token_type(pieces)
    lengths: list[int] = []
    text_bytes = 0
    for tokens, size in documents:
        content.put(tokens.astype(kind).tobytes())
        lengths.append(len(tokens))
        text_bytes += size
    ends = np.cumsum(lengths, dtype="<u8")
    total = int(ends[-1]) if lengths else 0
    content.put(bytes(-total * kind.itemsize % 8))
    content.put(ends.tobytes())
    return content.end(
        Footer(VERSION, source, source_size, tokenizer, pieces, eos, len(lengths), total, text_bytes, sha256="")
    )


def add_checksums(file: IO[bytes], parts: Iterable[bytes | memoryview], footer: Footer) -> Footer:
    """Writes a shard of version 1 anew with checksums. `parts`: all before its footer, which is checked on the way.

    Raises DataError where that is not what was written.
    """
    content = _Written(file)
    for part in parts:
        content.put(part)
    if content.digest.hexdigest() != footer.sha256:
        raise DataError(f"{footer.source}: its shard is damaged; {MAKE}")
    return content.end(replace(footer, version=VERSION))


class _Written:
    """What a shard holds, while it is written: its hash and its checksums."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest = file, hashlib.sha256()
        self._sums: list[int] = []
        self._size = self._sum = 0

    def put(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self._file.write(data)
        rest = memoryview(data)
        while len(rest):
            part = rest[: BLOCK - self._size % BLOCK]
            self._sum = crc32(part, self._sum)
            self._size += len(part)
            rest = rest[len(part) :]
            if self._size % BLOCK == 0:
                self._sums.append(self._sum)
                self._sum = 0

    def end(self, footer: Footer) -> Footer:
        """Writes the checksums and the footer, and returns it with the hash of all before it."""
        sums = [*self._sums, self._sum] if self._size % BLOCK else self._sums
        data = np.array(sums, "<u4").tobytes()
        self.digest.update(data)
        footer = replace(footer, sha256=self.digest.hexdigest())
        words = json.dumps(asdict(footer)).encode()
        self._file.write(data + words + TAIL.pack(len(words), MAGIC))
        return footer


def read_footer(content: Content, url: str) -> Footer:
    """The footer of a shard. Raises DataError when it is none, not whole or of another version."""
    broken = DataError(f"{url}: no whole shard of tokens; {MAKE}")
    if content.size < TAIL.size:
        raise broken
    length, magic = TAIL.unpack(content.read(content.size - TAIL.size, content.size))
    if magic != MAGIC or length > min(content.size - TAIL.size, LONGEST_FOOTER):
        raise broken
    words = bytes(content.read(content.size - TAIL.size - length, content.size - TAIL.size))
    try:
        version = parse(words, _Version)["version"]
        footer = Footer(**parse(words, _Footer)) if version in (UNCHECKED, VERSION) else None
    except ValueError:
        raise broken from None
    if footer is None:
        raise DataError(f"{url}: of format {version}, this program reads {VERSION}; {MAKE}")
    if footer.start + length + TAIL.size != content.size or footer.eos >= footer.pieces:
        raise broken
    return footer
