"""What a server must say about a range of a file before its bytes are believed.

fsspec's and s3fs's own files were tried: they take whatever bytes come for the ones that were asked for.
Imports nothing of a store's client.
"""

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from stablelm.data.storage.options import Stamp
from stablelm.data.storage.stores import STALL_SECONDS, base_name
from stablelm.errors import DataError

# A body that brings fewer bytes than this in STALL_SECONDS has stalled.
TRICKLE = 16 << 10
# How a server labels the bytes of files that are stored compressed.
STORED = {".gz": ("gzip", "x-gzip"), ".zst": ("zstd",)}


@dataclass(frozen=True)
class Range:
    """Bytes start..stop-1 of the file at `url`, which has this stamp."""

    url: str
    start: int
    stop: int
    stamp: Stamp

    @property
    def header(self) -> str:
        return f"bytes={self.start}-{self.stop - 1}"

    def check(self, status: int, headers: Mapping[str, str]) -> None:
        """Raises DataError unless the answer is to this request: range, length, total and encoding."""
        check_encoding(self.url, headers)
        if status == 200 and (self.start, self.stop) == (0, self.stamp.size):
            self._check_length(headers)
            return
        if status != 206:
            raise DataError(
                f"{self.url}: the server does not serve parts of a file (HTTP range requests): it answered {status} to "
                f"{self.header}; download the files, or use a server that supports ranges"
            )
        told = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", told.strip())
        if match is None:
            raise self._refused(f"answered without a valid Content-Range ({told[:80]!r})")
        first, last, total = match.groups()
        if total not in ("*", str(self.stamp.size)):
            raise changed(self.url, self.stamp, Stamp(int(total), self.stamp.tag))
        if (int(first), int(last)) != (self.start, self.stop - 1):
            raise self._refused(f"answered bytes {first}-{last}")
        self._check_length(headers)

    def check_tag(self, told: str) -> None:
        """Raises DataError unless the answer is of the content that was opened first, as its ETag or date tells."""
        if told and told != self.stamp.tag:
            raise changed(self.url, self.stamp, Stamp(self.stamp.size, told))
        if self.stamp.tag and not told:
            raise self._refused(f"does not repeat the ETag or Last-Modified {self.stamp.tag}")

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("Content-Length")
        if length is not None and length != str(self.stop - self.start):
            raise self._refused(f"answered {length} bytes")

    async def body(self, read: Callable[[int], Awaitable[bytes]], *, ends: bool) -> bytes:
        """All bytes of the range from `read(most)`; `ends`: the end of the body follows from its length alone.

        Raises ConnectionError when the body is cut or stalls, which another request may mend, DataError when it
        goes on beyond the range.
        """
        wanted = self.stop - self.start
        parts: list[bytes] = []
        have = marked = 0
        since = time.monotonic()
        while have < wanted or not ends:
            part = await read(wanted - have + 1)
            if not part:
                break
            parts.append(part)
            have += len(part)
            if have > wanted:
                raise self._refused(f"sent more than {wanted} bytes")
            now = time.monotonic()
            if have - marked >= TRICKLE:
                marked, since = have, now
            elif now - since > STALL_SECONDS:
                raise ConnectionError(f"only {have - marked} bytes in {STALL_SECONDS:g} s")
        if have < wanted:
            raise ConnectionError(f"the connection was closed after {have} of {wanted} bytes")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _refused(self, what: str) -> DataError:
        return DataError(
            f"{self.url}: the server {what} where {self.header.replace('=', ' ')} were requested; use another server "
            "or mirror, or download the files"
        )


def check_encoding(url: str, headers: Mapping[str, str]) -> None:
    """Raises DataError where the body is another one than the stored bytes."""
    told = headers.get("Content-Encoding", "").strip().lower()
    stored = next((labels for suffix, labels in STORED.items() if base_name(url).endswith(suffix)), ())
    transfer = headers.get("Transfer-Encoding", "").strip().lower()
    if told not in ("", "identity", "aws-chunked", *stored):
        coding = f"Content-Encoding: {told[:40]}"
    elif transfer not in ("", "identity", "chunked"):
        coding = f"Transfer-Encoding: {transfer[:40]}"
    else:
        return
    raise DataError(
        f"{url}: the server compresses what it sends ({coding}) though the stored bytes were requested; "
        "switch that off for these files, or use another server"
    )


def changed(url: str, old: Stamp, new: Stamp) -> DataError:
    """What is raised for a file that is not the one that was opened first."""
    how = f"from {old.size} to {new.size} bytes" if old.size != new.size else f"from {old.tag} to {new.tag}"
    return DataError(f"{url}: changed {how} while it was read; put the old file back, or start a new run")
