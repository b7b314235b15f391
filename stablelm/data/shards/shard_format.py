"""Prepared shards: the tokens of one source file in one file, row by row in the same order.

Layout, little-endian: the tokens of all rows, eos after each (uint16, or uint32 for more than 65,535
pieces), zeros up to a multiple of 8, the end of each row counted in tokens (uint64), the CRC-32 of each
64 KiB of all that (uint32; not in version 1), a footer in JSON, and a tail of 16 bytes: the footer's length
(uint64) and a magic word. A mask beside it (`.mask`) has one
bit a row, lowest bit first; a row whose bit is 1 is excluded, which is the same as a row without tokens.
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

from stablelm.data.storage.options import base_name
from stablelm.errors import DataError
from stablelm.json_text import Count, parse

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32


import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stablelm.data.storage.options import local_path
from stablelm.errors import ConfigError, StorageError

SUFFIX, MASK = ".tokens", ".mask"
VERSION = 2
UNCHECKED = 1  # the version without checksums, which is still read
MAGIC = b"LMTOKENS"
TAIL = struct.Struct("<Q8s")
BLOCK = 1 << 16  # bytes of a checksum
LONGEST_FOOTER = 1 << 16
LARGEST_SMALL = 65_535  # pieces whose ids fit 16 bits
MAKE = "make it again with stablelm prepare"


class ShardContent(Protocol):
    """Bytes of a shard in any store. `size`: all of them."""

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
    """Path or URL of a shard's mask, if it has one."""
    head, mark, query = url.partition("?")
    return head.removesuffix(SUFFIX) + MASK + mark + query


@dataclass(frozen=True)
class ShardFooter:
    """The end of a shard. `text_bytes`: of its documents in UTF-8; `sha256`: of all before the footer."""

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


class _StoredVersion(TypedDict):
    version: int


class _StoredFooter(TypedDict):
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
) -> ShardFooter:
    """Writes a shard of `documents`: (tokens with eos, bytes of the text) of each row, in order."""
    content, kind = _ShardWriter(file), token_type(pieces)
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
        ShardFooter(VERSION, source, source_size, tokenizer, pieces, eos, len(lengths), total, text_bytes, sha256="")
    )


def add_checksums(file: IO[bytes], parts: Iterable[bytes | memoryview], footer: ShardFooter) -> ShardFooter:
    """Writes a shard of version 1 anew with checksums. `parts`: all before its footer, which is checked on the way.

    Raises DataError where that is not what was written.
    """
    content = _ShardWriter(file)
    for part in parts:
        content.put(part)
    if content.digest.hexdigest() != footer.sha256:
        raise DataError(f"{footer.source}: its shard is damaged; {MAKE}")
    return content.end(replace(footer, version=VERSION))


class _ShardWriter:
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

    def end(self, footer: ShardFooter) -> ShardFooter:
        """Writes the checksums and the footer, and returns it with the hash of all before it."""
        sums = [*self._sums, self._sum] if self._size % BLOCK else self._sums
        data = np.array(sums, "<u4").tobytes()
        self.digest.update(data)
        footer = replace(footer, sha256=self.digest.hexdigest())
        words = json.dumps(asdict(footer)).encode()
        self._file.write(data + words + TAIL.pack(len(words), MAGIC))
        return footer


def read_footer(content: ShardContent, url: str) -> ShardFooter:
    """The footer of a shard. Raises DataError when the file is not a shard, incomplete or of another version."""
    broken = DataError(f"{url}: not a complete file of prepared tokens; {MAKE}")
    if content.size < TAIL.size:
        raise broken
    length, magic = TAIL.unpack(content.read(content.size - TAIL.size, content.size))
    if magic != MAGIC or length > min(content.size - TAIL.size, LONGEST_FOOTER):
        raise broken
    words = bytes(content.read(content.size - TAIL.size - length, content.size - TAIL.size))
    try:
        version = parse(words, _StoredVersion)["version"]
        footer = ShardFooter(**parse(words, _StoredFooter)) if version in (UNCHECKED, VERSION) else None
    except ValueError:
        raise broken from None
    if footer is None:
        raise DataError(f"{url}: has format version {version}, this program reads {VERSION}; {MAKE}")
    if footer.start + length + TAIL.size != content.size or footer.eos >= footer.pieces:
        raise broken
    return footer


T = TypeVar("T")
READ_ONLY = ("http://", "https://")


@dataclass(frozen=True)
class OutputFolder:
    """A folder here or in any store that fsspec can write. A file appears under its name complete or not at all."""

    where: str

    @property
    def folder(self) -> Path | None:
        path = local_path(self.where)
        return None if path is None else Path(path).expanduser()

    def url(self, name: str) -> str:
        """Path or URL of a file in it."""
        return str(self.folder / name) if self.folder is not None else f"{self.where.rstrip('/')}/{name}"

    def create(self, key: str) -> None:
        """Makes the folder. Raises ConfigError under `key` when that cannot be, or nothing can be written there."""
        if self.where.startswith(READ_ONLY):
            raise ConfigError(
                f"{key}: nothing can be written to {self.where!r}; give a folder, or s3://, gs:// or az://"
            )
        try:
            if self.folder is None:
                self._store()
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
        except OSError as error:
            fix = "give a folder that can be written"
            raise ConfigError(f"{key}: cannot write to {self.where!r} ({error.strerror}); {fix}") from None
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{key}: {self.where!r} cannot be opened ({error}); install what it needs") from None

    def put(self, name: str, write: Callable[[IO[bytes]], T]) -> T:
        """A file of what `write` writes. Raises StorageError when the storage is full or fails."""
        try:
            return self._put_local(self.folder, name, write) if self.folder is not None else self._put(name, write)
        except OSError as error:
            words = error.strerror or str(error)
            raise StorageError(
                f"{self.url(name)}: cannot be written ({words}); make room or give another --out, and run again: "
                "finished files are kept"
            ) from error

    def remove(self, name: str) -> None:
        """Deletes a file that may not be there. Raises StorageError."""
        try:
            if self.folder is not None:
                (self.folder / name).unlink(missing_ok=True)
                return
            filesystem, path = self._store()
            if filesystem.exists(f"{path}/{name}"):
                filesystem.rm_file(f"{path}/{name}")
        except Exception as error:  # every store's library has its own errors
            raise StorageError(f"{self.url(name)}: cannot be deleted ({error}); run again") from error

    def sweep(self, names: list[str]) -> None:
        """Deletes the incomplete files of killed runs of these names; no other run may be writing them."""
        if self.folder is None:
            return
        wanted = set(names)
        for path in self.folder.glob(".*.partial-*"):
            if path.name[1:].partition(".partial-")[0] in wanted:
                path.unlink(missing_ok=True)

    def _put_local(self, folder: Path, name: str, write: Callable[[IO[bytes]], T]) -> T:
        staging = None
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.partial-", delete=False) as file:
                staging = Path(file.name)
                result = write(file)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            staging.chmod(0o644)
            os.replace(staging, folder / name)
            return result
        except BaseException:
            if staging is not None:
                staging.unlink(missing_ok=True)
            raise

    def _put(self, name: str, write: Callable[[IO[bytes]], T]) -> T:
        with tempfile.NamedTemporaryFile(prefix=f"{name}-") as file:
            result = write(file)  # type: ignore[arg-type]
            file.flush()
            try:
                filesystem, path = self._store()
                filesystem.put_file(file.name, f"{path}/{name}")
            except OSError:
                raise
            except Exception as error:  # every store's library has its own errors
                raise OSError(f"{type(error).__name__}: {error}") from error
        return result

    def _store(self) -> tuple[Any, str]:
        import fsspec

        filesystem, path = fsspec.url_to_fs(self.where, use_listings_cache=False)
        return filesystem, path.rstrip("/")
