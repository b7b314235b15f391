"""Files of data sets on the hub, read at their resolve addresses without the hub's API.

Where the commit is known the API has nothing more to tell, so that the ranks of a run do not ask it: one HEAD
tells size and tag, and each range is fetched by a GET, which is mostly redirected to a signed address elsewhere.
Nothing is retried here: `retry.persist` sees every failure, waits as the hub asks and counts the time.
Imports aiohttp and the hub's client, so only those import this module who need it.
"""

import io
import os
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import aiohttp
from fsspec.config import conf
from fsspec.implementations.http import HTTPFileSystem
from huggingface_hub import constants, get_token
from yarl import URL

from stablelm.data.storage import hub, stores
from stablelm.data.storage.http_file import ANYWHERE, PLAIN, Refusal, checked, keep_only, run
from stablelm.data.storage.options import ReadOptions, Stamp
from stablelm.data.storage.ranges import Range, changed
from stablelm.errors import DataError

REDIRECTS = 5
# How a store answers to a signature that has run out.
RUN_OUT = (400, 401, 403, 404, 410)


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
    place where a redirect ends; such a place must repeat its own.
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
        self._stamps = options.stamps
        self._seconds = options.first_answer
        self._offset = 0
        self._stamp = options.stamps.get(url)

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        """`size` bytes from the current offset, which must lie in the file."""
        data = self._run(self._range(Range(self._url, self._offset, self._offset + size, self.stamp())))
        self._offset += len(data)
        return data

    def stamp(self) -> Stamp:
        """Size and tag, asked for once."""
        self._stamp = self._stamp or self._run(self._look())
        return self._stamp

    def close(self) -> None:
        """Connections belong to the process."""

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return run(_store(os.getpid()), work, self._seconds)

    async def _look(self) -> Stamp:
        """Size and tag by HEAD. A redirect that tells them is not followed: a signed address may be for GET only."""
        session, address = await _store(os.getpid()).set_session(), self._address
        for _ in range(REDIRECTS):
            request = session.head(address, allow_redirects=False, headers=PLAIN, middlewares=(self._authorize,))
            async with request as answer:
                self._check(answer)
                told, moved = answer.headers, 300 <= answer.status < 400
                size = told.get("X-Linked-Size") or (None if moved else told.get("Content-Length"))
                if size is not None:
                    tag = told.get("X-Linked-ETag") or told.get("ETag", "")
                    return Stamp(int(size), _plain_tag(tag))
                if not moved or "Location" not in told:
                    break
                address = address.join(URL(told["Location"], encoded=True))  # a data set that was renamed, or a mirror
        raise io.UnsupportedOperation("the hub does not tell the size of the file")

    async def _range(self, wanted: Range) -> bytes:
        if self._signed is not None:
            try:
                return await self._fetch(self._signed, wanted)
            except Refusal as refusal:
                if refusal.status not in RUN_OUT:
                    raise
                self._signed = None
        return await self._fetch(self._address, wanted)

    async def _fetch(self, address: URL, wanted: Range) -> bytes:
        session = await _store(os.getpid()).set_session()
        headers = {**PLAIN, "Range": wanted.header}
        async with session.get(address, headers=headers, middlewares=(self._authorize,)) as answer:
            self._check(answer)
            if answer.history:
                self._signed = answer.url
            data = await checked(answer, wanted, None)
            self._check_tag(answer, wanted)
            return data

    def _check_tag(self, answer: aiohttp.ClientResponse, wanted: Range) -> None:
        """Raises DataError where the same place tells another tag than before."""
        origin = answer.url.origin()
        told = Stamp(wanted.stamp.size, _plain_tag(answer.headers.get("ETag", "")))
        if origin == self._address.origin() and not answer.history:
            known = wanted.stamp
        else:
            known = self._stamps.setdefault(f"{self._url} from {origin}", told)
        if told != known:
            raise changed(self._url, known, told)

    async def _authorize(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        """The token is for HF_ENDPOINT alone; what a netrc file says is for neither it nor a redirect's target."""
        keep_only(request, ANYWHERE)
        if request.url.origin() == URL(constants.ENDPOINT).origin() and (token := _token(self._token)):
            request.headers["Authorization"] = f"Bearer {token}"
        return await handler(request)

    def _check(self, answer: aiohttp.ClientResponse) -> None:
        """Raises Refusal, or DataError where a token is wanted."""
        if answer.status in (401, 403) and answer.url.origin() == self._address.origin():
            fix = "accept the data set's licence there and set HF_TOKEN"
            if answer.url.origin() != URL(constants.ENDPOINT).origin():
                fix = f"a token is sent to HF_ENDPOINT alone, which is {constants.ENDPOINT}; set that to this address"
            raise DataError(f"{self._url}: the hub answers {answer.status}; {fix}")
        if answer.status >= 400:
            raise Refusal(answer)


def _plain_tag(tag: str) -> str:
    return tag.removeprefix("W/").strip('"')


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
