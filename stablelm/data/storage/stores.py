"""Files of any store: opened through fsspec, one client a store and process."""

import importlib.util
import io
import json
import os
from functools import lru_cache
from typing import Any

from stablelm.data.storage import hub
from stablelm.data.storage.options import FAMILIES, ReadOptions, Stamp
from stablelm.small_files import open_regular

# A connection without a byte for so long is given up and retried.
STALL_SECONDS = 30.0
# Connections of one process to one store.
CONNECTIONS = 32
PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}
"""Package and our extra for the stores whose client is not always installed."""
TAGS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "Last-Modified", "LastModified", "last_modified", "mtime")


def base_name(url: str) -> str:
    """Last part of a path or URL without its query: what names a file wherever it is stored."""
    path = url.split("?", 1)[0] if "://" in url else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def local_path(url: str) -> str | None:
    """The path of a local file, None for any other store."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or "::" in url else url


def missing_package(url: str) -> str | None:
    """A sentence about the package that this store needs, if it is not installed."""
    scheme = url.partition("://")[0]
    package, extra = PACKAGES.get(FAMILIES.get(scheme, scheme), (None, None))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{scheme}:// needs the package {package}; install it with: pip install 'stablelm[{extra}]'"


def open_file(url: str, options: ReadOptions) -> tuple[Any, Stamp]:
    """An open file that can seek, and its stamp; remote ones fetch what is read, without reading ahead."""
    path = local_path(url)
    if path is not None:
        local = io.FileIO(open_regular(path))
        return local, local_stamp(local)
    if hub.PINNED.fullmatch(url):
        from stablelm.data.storage import hub_file  # with aiohttp and the hub's client

        return hub_file.open_pinned(url, options)
    family = FAMILIES.get(url.partition("://")[0], url.partition("://")[0])
    if "::" not in url and family == "http":
        from stablelm.data.storage import http_file  # with aiohttp

        return http_file.open_http(url, options)
    if "::" not in url and family == "s3":
        from stablelm.data.storage import s3_file

        return s3_file.open_s3(url, options)
    store, path = filesystem(url, options)
    file = store.open(path, "rb", block_size=options.block, cache_type="none")
    # What was found in opening the file, where the store keeps it.
    info = getattr(file, "details", None) or store.info(path)
    return file, Stamp(int(info["size"]), tag(info))


def local_stamp(file: io.FileIO) -> Stamp:
    status = os.fstat(file.fileno())
    return Stamp(status.st_size, str(status.st_mtime_ns))


def tag(info: dict[str, Any]) -> str:
    """What a store tells of a file's content: ETag, version or time of change, '' for nothing."""
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
