"""Data sets on the Hugging Face hub: lists of files by `datasets`' own builder, and files read at their addresses.

huggingface_hub's HfFileSystem 2.4.0 was tried: its reads take shifted, cut and whole answers for the bytes requested,
retry for a fixed time of their own, log signed addresses, and ask the API once a process for every folder.
Where the commit is known the API adds nothing, so that the ranks of a run do not call it: one HEAD
reports size and tag, and each range is fetched by a GET, which is mostly redirected to a signed address elsewhere.
Nothing is retried here: `retry.persist` sees every failure, waits as the hub asks and counts the time.
Imports aiohttp and the hub's client, so only those import this module who need it.
"""

import io
import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import aiohttp
from fsspec.config import conf
from fsspec.implementations.http import HTTPFileSystem
from huggingface_hub import constants, get_session, get_token
from yarl import URL

from stablelm.data.storage import options, stores
from stablelm.data.storage.http_file import ANYWHERE, PLAIN, HttpRefusal, RangedFile, checked, keep_only
from stablelm.data.storage.options import HUB, PINNED_FILE, ReadOptions, Stamp, changed
from stablelm.data.storage.retry import causes, persist, words
from stablelm.data.storage.stores import ByteRange
from stablelm.errors import ConfigError, DataError

UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
REDIRECTS = 5
# How a store answers to a signature that has run out.
RUN_OUT = (400, 401, 403, 404, 410)
FORM = "hf://datasets/<owner>/<name>[@<revision>]/<file or pattern>"


def expand(url: str, *, key: str) -> list[str]:
    """URLs of the files that `hf://datasets/<owner>/<name>[@<revision>]/<pattern>` matches.

    The revision in the URLs is the commit that was found, so that later reads see the same files.
    Raises ConfigError under `key` when the form is wrong, nothing matches or the hub is out of reach.
    """
    match = re.fullmatch(re.escape(HUB) + r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if match is None:
        raise ConfigError(f"{key}: {url!r} does not name files of a data set on the hub; write {FORM}")
    name, revision, pattern = match.groups()
    # datasets looks for a folder of this name first.
    if os.path.isdir(name):
        raise ConfigError(
            f"{key}: {url!r} would be looked up in the local folder {name!r}; give that folder itself as the path, "
            "or start from another folder"
        )
    reach(url, key=key)
    import datasets  # takes seconds: pandas and pyarrow come with it

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(
            name, data_files={"train": pattern}, revision=revision and revision.replace("%2F", "/")
        )
        files = [str(file) for file in (builder.config.data_files or {})["train"]]
    # The hub's client has no common error class: any failure here means that the list cannot be had.
    except Exception as error:
        raise ConfigError(sentence(error, url, key)) from error
    return files


def reach(url: str, *, key: str) -> None:
    """Raises ConfigError under `key` unless the hub answers within seconds; its own client tries for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return
    seconds = options.FIRST_ANSWER
    try:
        persist(
            lambda: get_session().head(constants.ENDPOINT, timeout=seconds),
            name=constants.ENDPOINT,
            budget=seconds,
            first_answer=seconds,
        )
    except DataError as error:
        cause = words(error.__cause__ or error)
        raise ConfigError(
            f"{key}: cannot reach the hub for {url!r}; give the https URL of a mirror or a folder with its files "
            f"({constants.ENDPOINT} does not answer: {cause})"
        ) from error


def sentence(error: Exception, url: str, key: str) -> str:
    """Why `url` cannot be had from the hub, and what to do."""
    links = causes(error, context=True)
    names = {type(link).__name__ for link in links}
    # datasets reports a failed connection as a missing file, with the client's error named in the message.
    if names & UNREACHABLE or any(name in str(link) for link in links for name in UNREACHABLE):
        return f"{key}: cannot reach the hub for {url!r}; give the https URL of a mirror or a folder with its files"
    if "GatedRepoError" in names:
        return f"{key}: {url!r} is gated; accept its licence on the hub and set HF_TOKEN"
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        return f"{key}: the hub has no data set or revision {url!r}; check owner, name and revision, or set HF_TOKEN"
    if names & {"FileNotFoundError", "EntryNotFoundError", "DataFilesNotFoundError"}:
        return f"{key}: no file on the hub matches {url!r}; check the pattern against the data set's file list"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{key}: the hub gave no file list for {url!r} ({reason}); try again, or give a mirror or a folder"


class HubFile(RangedFile):
    """The open file at `hf://datasets/<name>@<commit>/<path>`; its stamp is asked for once in a process.

    No request is conditional: a commit's files never change, and the tag that the hub reports is not that
    of the server where a redirect ends; such a server must repeat its own.
    Raises DataError when the hub's client is to stay offline or the hub refuses the file.
    """

    def __init__(self, url: str, options: ReadOptions):
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{url}: HF_HUB_OFFLINE forbids requests to the hub; unset it, or give a folder with its files"
            )
        super().__init__(url, _store(os.getpid()), options.first_answer)
        match = PINNED_FILE.fullmatch(url)
        assert match is not None
        name, commit, path = match.groups()
        settings = {**conf.get("hf", {}), **options.settings("hf")}
        endpoint = (settings.get("endpoint") or constants.ENDPOINT).rstrip("/")
        self._token = settings.get("token")
        self._address = URL(f"{endpoint}/datasets/{name}/resolve/{commit}/{quote(path)}", encoded=True)
        self._signed: URL | None = None  # where the last range came from: the hub counts the requests that it redirects
        self._stamps = options.stamps
        self.stamp = options.stamps.get(url) or self._run(self._look())

    async def _look(self) -> Stamp:
        """Size and tag by HEAD. A redirect that reports them is not followed: a signed address may be for GET only."""
        session, address = await self._store.set_session(), self._address
        for _ in range(REDIRECTS):
            request = session.head(address, allow_redirects=False, headers=PLAIN, middlewares=(self._authorize,))
            async with request as answer:
                self._check(answer)
                headers, moved = answer.headers, 300 <= answer.status < 400
                size = headers.get("X-Linked-Size") or (None if moved else headers.get("Content-Length"))
                if size is not None:
                    tag = headers.get("X-Linked-ETag") or headers.get("ETag", "")
                    return Stamp(int(size), _plain_tag(tag))
                if not moved or "Location" not in headers:
                    break
                address = address.join(
                    URL(headers["Location"], encoded=True)
                )  # a data set that was renamed, or a mirror
        raise io.UnsupportedOperation("the hub does not report the size of the file")

    async def _fetch(self, wanted: ByteRange) -> bytes:
        if self._signed is not None:
            try:
                return await self._fetch_from(self._signed, wanted)
            except HttpRefusal as refusal:
                if refusal.status not in RUN_OUT:
                    raise
                self._signed = None
        return await self._fetch_from(self._address, wanted)

    async def _fetch_from(self, address: URL, wanted: ByteRange) -> bytes:
        session = await self._store.set_session()
        headers = {**PLAIN, "Range": wanted.header}
        async with session.get(address, headers=headers, middlewares=(self._authorize,)) as answer:
            self._check(answer)
            if answer.history:
                self._signed = answer.url
            data = await checked(answer, wanted, None)
            self._check_tag(answer, wanted)
            return data

    def _check_tag(self, answer: aiohttp.ClientResponse, wanted: ByteRange) -> None:
        """Raises DataError where the same server reports another tag than before."""
        origin = answer.url.origin()
        reported = Stamp(wanted.stamp.size, _plain_tag(answer.headers.get("ETag", "")))
        if origin == self._address.origin() and not answer.history:
            known = wanted.stamp
        else:
            known = self._stamps.setdefault(f"{self._url} from {origin}", reported)
        if reported != known:
            raise changed(self._url, known, reported)

    async def _authorize(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        """The token is for HF_ENDPOINT alone; what a netrc file says is for neither it nor a redirect's target."""
        keep_only(request, ANYWHERE)
        if request.url.origin() == URL(constants.ENDPOINT).origin() and (token := _token(self._token)):
            request.headers["Authorization"] = f"Bearer {token}"
        return await handler(request)

    def _check(self, answer: aiohttp.ClientResponse) -> None:
        """Raises HttpRefusal, or DataError where a token is wanted."""
        if answer.status in (401, 403) and answer.url.origin() == self._address.origin():
            fix = "accept the data set's licence there and set HF_TOKEN"
            if answer.url.origin() != URL(constants.ENDPOINT).origin():
                fix = f"a token is sent to HF_ENDPOINT alone, which is {constants.ENDPOINT}; set that to this address"
            raise DataError(f"{self._url}: the hub answers {answer.status}; {fix}")
        if answer.status >= 400:
            raise HttpRefusal(answer)


def _plain_tag(tag: str) -> str:
    return tag.removeprefix("W/").strip('"')


def _token(setting: str | bool | None) -> str | None:
    """As the hub's own client chooses it."""
    if isinstance(setting, str):
        return setting
    if setting is False or (setting is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
        return None
    return get_token()


@lru_cache(maxsize=16)
def _store(process: int) -> HTTPFileSystem:
    """Keeps this process' connections to the hub and closes them at its end; what is set for http:// is not the hub's.

    Redirects are followed to the letter, since a signature may cover how the address is written.
    """
    settings = {"requote_redirect_url": False}
    return HTTPFileSystem(get_client=stores.http_client, client_kwargs=settings, skip_instance_cache=True)
