"""Prepared shards: the tokens of one source file in one file, row by row in the same order.

Layout, little-endian: the tokens of all rows, eos after each (uint16, or uint32 for more than 65,535
pieces), zeros up to a multiple of 8, the end of each row counted in tokens (uint64), a footer in JSON,
and a tail of 16 bytes: the footer's length (uint64) and a magic word. A mask beside it (`.mask`) has one
bit a row, lowest bit first; a row whose bit is 1 is left out, which is the same as a row without tokens.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO, Protocol

import numpy as np

from stablelm.data.stores import base_name
from stablelm.errors import DataError

SUFFIX, MASK = ".tokens", ".mask"
VERSION = 1
MAGIC = b"LMTOKENS"
TAIL = struct.Struct("<Q8s")
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
    def start(self) -> int:
        """Byte at which the footer begins."""
        return self.index + 8 * self.rows


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
    digest, kind = hashlib.sha256(), token_type(pieces)
    lengths: list[int] = []
    text_bytes = 0

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    for tokens, size in documents:
        put(tokens.astype(kind).tobytes())
        lengths.append(len(tokens))
        text_bytes += size
    ends = np.cumsum(lengths, dtype="<u8")
    total = int(ends[-1]) if lengths else 0
    put(bytes(-total * kind.itemsize % 8))
    put(ends.tobytes())
    footer = Footer(
        VERSION, source, source_size, tokenizer, pieces, eos, len(lengths), total, text_bytes, digest.hexdigest()
    )
    words = json.dumps(asdict(footer)).encode()
    file.write(words + TAIL.pack(len(words), MAGIC))
    return footer


def read_footer(content: Content, url: str) -> Footer:
    """The footer of a shard. Raises DataError when it is none, not whole or of another version."""
    broken = DataError(f"{url}: no whole shard of tokens; {MAKE}")
    if content.size < TAIL.size:
        raise broken
    length, magic = TAIL.unpack(content.read(content.size - TAIL.size, content.size))
    if magic != MAGIC or length > content.size - TAIL.size:
        raise broken
    try:
        words = json.loads(bytes(content.read(content.size - TAIL.size - length, content.size - TAIL.size)))
        version = words["version"]
        footer = Footer(**words) if version == VERSION else None
    except (ValueError, TypeError, KeyError):
        raise broken from None
    if footer is None:
        raise DataError(f"{url}: of format {version}, this program reads {VERSION}; {MAKE}")
    if footer.start + length + TAIL.size != content.size:
        raise broken
    return footer
