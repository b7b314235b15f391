"""Files of web servers and of S3, read by ranges that are checked, with credentials that stay where they belong.

Nothing is retried here: `retry.persist` sees every failure, waits as the server asks and counts the time.
Imports aiohttp, so only those import this module who need it.
"""

import asyncio
import io
import re
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar, cast

import aiohttp
from fsspec.asyn import sync
from yarl import URL

from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions, Stamp, changed
from stablelm.data.storage.stores import ByteRange, check_encoding

# Lengths and ranges are those of the stored bytes.
PLAIN = {"Accept-Encoding": "identity"}
# What may be sent to a server that another one redirects to; all else may be a credential.
ANYWHERE = {
    "Accept", "Accept-Encoding", "Connection", "Host", "If-Match", "If-Unmodified-Since", "Range", "User-Agent",
}  # fmt: skip
# What S3's client calls the headers of an answer.
S3_HEADERS = {
    "Content-Range": "ContentRange",
    "Content-Length": "ContentLength",
    "Content-Encoding": "ContentEncoding",
}
T = TypeVar("T")


class HttpRefusal(OSError):
    """An answer with an error status; its message lacks the address, which may be a signed one."""

    def __init__(self, answer: aiohttp.ClientResponse):
        super().__init__(f"{answer.url.host} answers {answer.status} {answer.reason or ''}".rstrip())
        self.status, self.headers = answer.status, answer.headers


class RangedFile:
    """An open file that can seek and is read by ranges: what files of web servers, S3 and the hub have in common.

    `seconds` bounds each request, None: only its silence. `stamp` is set by the kinds of files, of which each fetches
    ranges in its own way.
    """

    stamp: Stamp

    def __init__(self, url: str, store: Any, seconds: float | None):
        self._url, self._store, self._seconds = url, store, seconds
        self._offset = 0

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        """`size` bytes from the current offset, which must be inside the file."""
        data = self._run(self._fetch(ByteRange(self._url, self._offset, self._offset + size, self.stamp)))
        self._offset += len(data)
        return data

    def close(self) -> None:
        """Connections belong to the process."""

    async def _fetch(self, wanted: ByteRange) -> bytes:
        raise NotImplementedError

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives in the client's event loop. Raises ConnectionError when time is up."""
        return cast(T, sync(self._store.loop, _within, work, self._seconds))


async def _within(work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:  # whose message may hold a signed address
        raise ConnectionError(f"no answer for {seconds or stores.STALL_SECONDS:g} s") from None


class HttpFile(RangedFile):
    """An open file of a web server. Its stamp is asked for at each opening."""

    def __init__(self, url: str, options: ReadOptions):
        store, address = stores.filesystem(url, options)
        super().__init__(url, store, options.first_answer)
        self._address = URL(address, encoded=store.encoded)
        self._request = dict(store.kwargs)  # what fsspec's options say of each request
        self.stamp, self._condition = self._run(self._look())

    async def _ask(self, method: str, **headers: str) -> aiohttp.ClientResponse:
        session = await self._store.set_session()
        headers = {**self._request.get("headers", {}), **PLAIN, **headers}
        others = {name: value for name, value in self._request.items() if name != "headers"}
        return await session.request(
            method, self._address, headers=headers, allow_redirects=True, middlewares=(self._guard,), **others
        )

    async def _guard(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        """No credential of the user, a netrc file's included, follows a redirect to another origin."""
        if request.url.origin() != self._address.origin():
            keep_only(request, ANYWHERE)
        return await handler(request)

    async def _look(self) -> tuple[Stamp, dict[str, str]]:
        """Stamp, and the condition of range requests; from a short range where HEAD does not report them."""
        async with await self._ask("HEAD") as answer:
            headers, length = answer.headers, answer.headers.get("Content-Length", "")
            if answer.status < 400 and length.isdigit():
                if headers.get("Accept-Ranges") == "none":
                    raise io.UnsupportedOperation("the server does not serve parts of the file")
                return self._described(int(length), headers)
            # Addresses that are signed for GET, and servers that do not know HEAD.
            if answer.status in (404, 408, 410, 425, 429) or (answer.status >= 500 and answer.status != 501):
                raise HttpRefusal(answer)
        async with await self._ask("GET", Range="bytes=0-0") as answer:
            total = re.fullmatch(r"bytes (?:0-0|\*)/(\d+)", answer.headers.get("Content-Range", "").strip())
            if answer.status >= 400 and answer.status != 416:
                raise HttpRefusal(answer)
            if total is None:
                raise io.UnsupportedOperation("the server neither reports the size of the file nor serves parts of it")
            return self._described(int(total[1]), answer.headers)

    def _described(self, size: int, headers: Mapping[str, str]) -> tuple[Stamp, dict[str, str]]:
        check_encoding(self._url, headers)
        return Stamp(size, header_tag(headers)), _condition(headers)

    async def _fetch(self, wanted: ByteRange) -> bytes:
        async with await self._ask("GET", Range=wanted.header, **self._condition) as answer:
            return await checked(answer, wanted, header_tag(answer.headers))


async def checked(answer: aiohttp.ClientResponse, wanted: ByteRange, tag: str | None) -> bytes:
    """The body of an answer to a request for this range, `tag` its ETag or date where that must be the stamp's.

    Raises HttpRefusal, ConnectionError where another request may help, DataError where the answer is not to be trusted.
    """
    if answer.status == 416 and (total := answer.headers.get("Content-Range", "").rpartition("/")[2]).isdigit():
        raise changed(wanted.url, wanted.stamp, Stamp(int(total), wanted.stamp.tag))
    if answer.status >= 400:
        raise HttpRefusal(answer)
    wanted.check(answer.status, answer.headers)
    if tag is not None:
        wanted.check_tag(tag)
    return await wanted.body(answer.content.read, ends="Content-Length" in answer.headers)


def keep_only(request: aiohttp.ClientRequest, names: set[str]) -> None:
    """Takes all headers but these from a request that is about to be sent."""
    kept = {name.lower() for name in names}
    for name in list(request.headers):
        if name.lower() not in kept:
            request.headers.popall(name, None)


def header_tag(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _condition(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with which a server refuses parts of a file that has changed."""
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if etag and not etag.startswith("W/"):
        return {"If-Match": etag}
    return {"If-Unmodified-Since": modified} if modified and not etag else {}


class S3File(RangedFile):
    """An open object of S3, whose stamp is asked for at each opening. Nothing is retried but what s3fs does itself."""

    def __init__(self, url: str, options: ReadOptions):
        store, path = stores.filesystem(url, options)
        super().__init__(url, store, options.first_answer)
        self._bucket, self._key, self._version = store.split_path(path)
        info = self._run(store._info(path))
        if info.get("type") == "directory":
            raise FileNotFoundError(path)
        self.stamp = Stamp(int(info["size"]), stores.tag(info))
        self._condition = {"IfMatch": info["ETag"]} if info.get("ETag") else {}

    async def _fetch(self, wanted: ByteRange) -> bytes:
        version = {"VersionId": self._version} if self._version else {}
        answer = await self._store._call_s3(
            "get_object", Bucket=self._bucket, Key=self._key, Range=wanted.header, **self._condition, **version
        )
        body = answer["Body"]
        try:
            headers = {name: str(answer[ours]) for name, ours in S3_HEADERS.items() if answer.get(ours) is not None}
            wanted.check(answer["ResponseMetadata"]["HTTPStatusCode"], headers)
            wanted.check_tag(stores.tag(answer))
            return await wanted.body(body.read, ends="Content-Length" in headers)
        finally:
            body.close()
