"""Stores of files: one fsspec client per store and process, and what an answer must contain before it is used.

fsspec's and s3fs's own files were tried: they take whatever bytes come for the ones that were asked for.
Imports no store's client: only remote files need one.
"""

import importlib.util
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stablelm.data.storage.options import FAMILIES, ReadOptions, Stamp, base_name, changed
from stablelm.errors import DataError

# A connection without a byte for so long is given up and retried.
STALL_SECONDS = 30.0
# A body that brings fewer bytes than this in STALL_SECONDS has stalled.
TRICKLE = 16 << 10
# How a server labels the bytes of files that are stored compressed.
STORED = {".gz": ("gzip", "x-gzip"), ".zst": ("zstd",)}
# Connections of one process to one store.
CONNECTIONS = 32
PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}
"""Package and our extra for the stores whose client is not always installed."""
TAGS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "Last-Modified", "LastModified", "last_modified", "mtime")


def missing_package(url: str) -> str | None:
    """A sentence about the package that this store needs, if it is not installed."""
    scheme = url.partition("://")[0]
    package, extra = PACKAGES.get(FAMILIES.get(scheme, scheme), (None, None))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{scheme}:// needs the package {package}; install it with: pip install 'stablelm[{extra}]'"


def tag(info: dict[str, Any]) -> str:
    """What a store reports of a file's content: ETag, version or time of change; '' for nothing."""
    return next((str(info[name]) for name in TAGS if info.get(name)), "")


def glob(pattern: str, options: ReadOptions) -> list[str]:
    """URLs of the objects that match, in no order."""
    scheme = pattern.partition("://")[0]
    store, path = filesystem(pattern, options)
    return [f"{scheme}://{name}" for name in store.glob(path)]


def filesystem(url: str, options: ReadOptions) -> tuple[Any, str]:
    """fsspec's file system for `url`, shared by the threads of this process, and the path in it."""
    # fsspec and its asyncio stack are only needed for remote files.
    import fsspec
    from fsspec.config import conf

    if "::" in url:
        return fsspec.url_to_fs(url)
    scheme = url.partition("://")[0]
    # fsspec keeps one client a thread, and so one pool of connections a thread; ours is one a process.
    store = _shared(os.getpid(), scheme, json.dumps([options.settings(scheme), conf.get(scheme)], default=str))
    return store, store._strip_protocol(url)


@lru_cache(maxsize=16)
def _shared(process: int, scheme: str, settings: str) -> Any:
    import fsspec

    given = json.loads(settings)[0]
    if FAMILIES.get(scheme, scheme) == "http":
        given = {"get_client": http_client, **given}
    elif FAMILIES.get(scheme, scheme) == "s3":
        given = {"use_listings_cache": False, **given}
        # Retries are ours: those below would hide a wait and spend its budget unseen.
        defaults = {"max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1}}
        given["config_kwargs"] = {**defaults, **given.get("config_kwargs", {})}
    return fsspec.filesystem(scheme, **given)


async def http_client(**settings: Any) -> Any:
    """A session of aiohttp with our bounds on stalls and connections."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    # What is sent compressed is refused, and not inflated: its ranges are not those of the stored bytes.
    ours = {"trust_env": True, "timeout": timeout, "connector": connector, "auto_decompress": False}
    settings = {**ours, **settings}
    return aiohttp.ClientSession(**settings)


@dataclass(frozen=True)
class ByteRange:
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
        given = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given.strip())
        if match is None:
            raise self._refused(f"answered without a valid Content-Range ({given[:80]!r})")
        first, last, total = match.groups()
        if total not in ("*", str(self.stamp.size)):
            raise changed(self.url, self.stamp, Stamp(int(total), self.stamp.tag))
        if (int(first), int(last)) != (self.start, self.stop - 1):
            raise self._refused(f"answered bytes {first}-{last}")
        self._check_length(headers)

    def check_tag(self, tag: str) -> None:
        """Raises DataError unless the answer is of the content that was opened first, as its ETag or date shows."""
        if tag and tag != self.stamp.tag:
            raise changed(self.url, self.stamp, Stamp(self.stamp.size, tag))
        if self.stamp.tag and not tag:
            raise self._refused(f"does not repeat the ETag or Last-Modified {self.stamp.tag}")

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("Content-Length")
        if length is not None and length != str(self.stop - self.start):
            raise self._refused(f"answered {length} bytes")

    async def body(self, read: Callable[[int], Awaitable[bytes]], *, ends: bool) -> bytes:
        """All bytes of the range from `read(most)`; `ends`: the end of the body follows from its length alone.

        Raises ConnectionError when the body is cut or stalls, which another request may cure, DataError when it
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
    content = headers.get("Content-Encoding", "").strip().lower()
    stored = next((labels for suffix, labels in STORED.items() if base_name(url).endswith(suffix)), ())
    transfer = headers.get("Transfer-Encoding", "").strip().lower()
    if content not in ("", "identity", "aws-chunked", *stored):
        coding = f"Content-Encoding: {content[:40]}"
    elif transfer not in ("", "identity", "chunked"):
        coding = f"Transfer-Encoding: {transfer[:40]}"
    else:
        return
    raise DataError(
        f"{url}: the server compresses what it sends ({coding}) though the stored bytes were requested; "
        "switch that off for these files, or use another server"
    )
