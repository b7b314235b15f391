"""Files of web servers, read by ranges that are checked, with credentials that stay where they belong.

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
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions, Stamp
from stablelm.data.storage.ranges import Range, changed, check_encoding

# Lengths and ranges are those of the stored bytes.
PLAIN = {"Accept-Encoding": "identity"}
# What may be sent to a server that another one redirects to; all else may be a credential.
ANYWHERE = {
    "Accept", "Accept-Encoding", "Connection", "Host", "If-Match", "If-Unmodified-Since", "Range", "User-Agent",
}  # fmt: skip
T = TypeVar("T")


class Refusal(OSError):
    """An answer with an error status, told without its address, which may be a signed one."""

    def __init__(self, answer: aiohttp.ClientResponse):
        super().__init__(f"{answer.url.host} answers {answer.status} {answer.reason or ''}".rstrip())
        self.status, self.headers = answer.status, answer.headers


def run(store: HTTPFileSystem, work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """What `work` gives in the store's loop, within so many seconds. Raises ConnectionError when time is up."""
    return cast(T, sync(store.loop, _within, work, seconds))


async def _within(work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:  # whose text may hold a signed address
        raise ConnectionError(f"no answer for {seconds or stores.STALL_SECONDS:g} s") from None


def open_http(url: str, options: ReadOptions) -> tuple["HttpFile", Stamp]:
    """The file at an http or https URL and its stamp, which is asked for at each opening."""
    store, address = stores.filesystem(url, options)
    file = HttpFile(store, url, address, options.first_answer)
    return file, file.stamp


class HttpFile:
    """An open file that can seek, as RangeFile reads it. `seconds` bounds each request, None: only its silence."""

    def __init__(self, store: HTTPFileSystem, url: str, address: str, seconds: float | None):
        self._store, self._url, self._seconds = store, url, seconds
        self._address = URL(address, encoded=store.encoded)
        self._request = dict(store.kwargs)  # what fsspec's options say of each request
        self._offset = 0
        self.stamp, self._condition = self._run(self._look())

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        """`size` bytes from the current offset, which must lie in the file."""
        data = self._run(self._range(self._offset, self._offset + size))
        self._offset += len(data)
        return data

    def close(self) -> None:
        """Connections belong to the process."""

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return run(self._store, work, self._seconds)

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
        """Stamp, and the condition on which ranges are asked for; by a short range where HEAD does not tell."""
        async with await self._ask("HEAD") as answer:
            headers, length = answer.headers, answer.headers.get("Content-Length", "")
            if answer.status < 400 and length.isdigit():
                if headers.get("Accept-Ranges") == "none":
                    raise io.UnsupportedOperation("the server does not serve parts of the file")
                return self._told(int(length), headers)
            # Addresses that are signed for GET, and servers that do not know HEAD.
            if answer.status in (404, 408, 410, 425, 429) or (answer.status >= 500 and answer.status != 501):
                raise Refusal(answer)
        async with await self._ask("GET", Range="bytes=0-0") as answer:
            told = answer.headers.get("Content-Range", "")
            total = re.fullmatch(r"bytes (?:0-0|\*)/(\d+)", told.strip())
            if answer.status >= 400 and answer.status != 416:
                raise Refusal(answer)
            if total is None:
                raise io.UnsupportedOperation("the server does not tell the size of the file or serve parts of it")
            return self._told(int(total[1]), answer.headers)

    def _told(self, size: int, headers: Mapping[str, str]) -> tuple[Stamp, dict[str, str]]:
        check_encoding(self._url, headers)
        return Stamp(size, tag(headers)), _condition(headers)

    async def _range(self, start: int, end: int) -> bytes:
        wanted = Range(self._url, start, end, self.stamp)
        async with await self._ask("GET", Range=wanted.header, **self._condition) as answer:
            return await checked(answer, wanted, tag(answer.headers))


async def checked(answer: aiohttp.ClientResponse, wanted: Range, told: str | None) -> bytes:
    """The body of an answer to a request for this range, `told` its ETag or date where that is to be the stamp's.

    Raises Refusal, ConnectionError where another request may help, DataError where the answer is not to be believed.
    """
    if answer.status == 416 and (total := answer.headers.get("Content-Range", "").rpartition("/")[2]).isdigit():
        raise changed(wanted.url, wanted.stamp, Stamp(int(total), wanted.stamp.tag))
    if answer.status >= 400:
        raise Refusal(answer)
    wanted.check(answer.status, answer.headers)
    if told is not None:
        wanted.check_tag(told)
    return await wanted.body(answer.content.read, ends="Content-Length" in answer.headers)


def keep_only(request: aiohttp.ClientRequest, names: set[str]) -> None:
    """Takes all headers but these from a request that is about to be sent."""
    kept = {name.lower() for name in names}
    for name in list(request.headers):
        if name.lower() not in kept:
            request.headers.popall(name, None)


def tag(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _condition(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with which a server refuses parts of a file that has changed."""
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if etag and not etag.startswith("W/"):
        return {"If-Match": etag}
    return {"If-Unmodified-Since": modified} if modified and not etag else {}
