"""Files of data sets on the hub, read at their resolve addresses without the hub's API.

Where the commit is known the API has nothing more to tell, so that the ranks of a run do not ask it: one HEAD
tells size and tag, and each range is fetched by a GET, which is mostly redirected to a signed address elsewhere.
Nothing is retried here: `retry.persist` sees every failure, waits as the hub asks and counts the time.
Imports aiohttp and the hub's client, so only those import this module who need it.
"""

import io
import os
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import aiohttp
from fsspec.asyn import sync
from fsspec.config import conf
from fsspec.implementations.http import HTTPFileSystem
from huggingface_hub import constants, get_token
from yarl import URL

from stablelm.data import hub, stores
from stablelm.data.options import ReadOptions, Stamp
from stablelm.errors import DataError

REDIRECTS = 5
# How a store answers to a signature that has run out.
RUN_OUT = (400, 401, 403, 404, 410)
# Lengths and ranges are those of the stored bytes.
PLAIN = {"Accept-Encoding": "identity"}


class Refusal(OSError):
    """An answer with an error status, told without its address, which may be a signed one."""

    def __init__(self, answer: aiohttp.ClientResponse):
        super().__init__(f"{answer.url.host} answers {answer.status} {answer.reason or ''}".rstrip())
        self.status, self.headers = answer.status, answer.headers


def open_pinned(url: str, options: ReadOptions) -> tuple["HubFile", Stamp]:
    """The file at `hf://datasets/<name>@<commit>/<path>` and its stamp, which is asked for once in a process.

    Raises DataError when the hub's client is told to stay offline or the hub refuses the file.
    """
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{url}: HF_HUB_OFFLINE forbids to ask the hub; unset it, or give a folder with its files")
    file = HubFile(url, options)
    return file, options.stamps.get(url) or file.stamp()


class HubFile:
    """An open file that can seek, as RangeFile reads it.

    No request is conditional: a commit's files never change, and the tag that the hub tells is not that of the
    place where a redirect ends.
    """

    def __init__(self, url: str, options: ReadOptions):
        match = hub.PINNED.fullmatch(url)
        assert match is not None
        name, commit, path = match.groups()
        told = {**conf.get("hf", {}), **options.settings("hf")}
        endpoint = (told.get("endpoint") or constants.ENDPOINT).rstrip("/")
        self._url, self._token = url, told.get("token")
        self._address = URL(f"{endpoint}/datasets/{name}/resolve/{commit}/{quote(path)}", encoded=True)
        self._signed: URL | None = None  # where the last range came from: the hub counts the requests that it redirects
        self._offset = 0

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        """At most `size` bytes from the current offset, which must lie in the file."""
        data = self._run(self._range, self._offset, self._offset + size)
        self._offset += len(data)
        return data

    def stamp(self) -> Stamp:
        return self._run(self._look)

    def close(self) -> None:
        """Connections belong to the process."""

    def _run(self, method: Any, *arguments: Any) -> Any:
        store = _store(os.getpid())
        return sync(store.loop, self._timed, store, method, *arguments)

    async def _timed(self, store: HTTPFileSystem, method: Any, *arguments: Any) -> Any:
        try:
            return await method(await store.set_session(), *arguments)
        except TimeoutError:  # whose text may hold a signed address
            raise ConnectionError(f"no answer for {stores.STALL_SECONDS:g} s") from None

    async def _look(self, session: aiohttp.ClientSession) -> Stamp:
        """Size and tag by HEAD. A redirect that tells them is not followed: a signed address may be for GET only."""
        address = self._address
        for _ in range(REDIRECTS):
            request = session.head(address, allow_redirects=False, headers=PLAIN, middlewares=(self._authorize,))
            async with request as answer:
                self._check(answer)
                told, moved = answer.headers, 300 <= answer.status < 400
                size = told.get("X-Linked-Size") or (None if moved else told.get("Content-Length"))
                if size is not None:
                    tag = told.get("X-Linked-ETag") or told.get("ETag", "")
                    return Stamp(int(size), tag.removeprefix("W/").strip('"'))
                if not moved or "Location" not in told:
                    break
                address = address.join(URL(told["Location"], encoded=True))  # a data set that was renamed, or a mirror
        raise io.UnsupportedOperation("the hub does not tell the size of the file")

    async def _range(self, session: aiohttp.ClientSession, start: int, end: int) -> bytes:
        if self._signed is not None:
            try:
                return await self._fetch(session, self._signed, start, end)
            except Refusal as refusal:
                if refusal.status not in RUN_OUT:
                    raise
                self._signed = None
        return await self._fetch(session, self._address, start, end)

    async def _fetch(self, session: aiohttp.ClientSession, address: URL, start: int, end: int) -> bytes:
        headers = {**PLAIN, "Range": f"bytes={start}-{end - 1}"}
        async with session.get(address, headers=headers, middlewares=(self._authorize,)) as answer:
            self._check(answer)
            if answer.history:
                self._signed = answer.url
            whole = start == 0 and (answer.content_length or end + 1) <= end
            if answer.status != 206 and not whole:
                raise io.UnsupportedOperation("the hub does not serve parts of the file")
            return await answer.read()

    async def _authorize(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        """The token is for the hub alone; what a netrc file says is for neither it nor a redirect's target."""
        request.headers.popall("Authorization", None)
        if request.url.origin() == self._address.origin() and (token := _token(self._token)):
            request.headers["Authorization"] = f"Bearer {token}"
        return await handler(request)

    def _check(self, answer: aiohttp.ClientResponse) -> None:
        """Raises Refusal, or DataError where a token is wanted."""
        if answer.status in (401, 403) and answer.url.origin() == self._address.origin():
            raise DataError(
                f"{self._url}: the hub answers {answer.status}; accept the data set's licence there and set HF_TOKEN"
            )
        if answer.status >= 400:
            raise Refusal(answer)


def _token(told: str | bool | None) -> str | None:
    """As the hub's own client chooses it."""
    if isinstance(told, str):
        return told
    if told is False or (told is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
        return None
    return get_token()


@lru_cache(maxsize=16)
def _store(process: int) -> HTTPFileSystem:
    """Keeps this process' connections to the hub and closes them at its end; what is set for http:// is not the hub's.

    Redirects are followed to the letter, since a signature may cover how the address is written.
    """
    settings = {"requote_redirect_url": False}
    return HTTPFileSystem(get_client=stores.http_client, client_kwargs=settings, skip_instance_cache=True)
