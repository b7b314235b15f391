"""A file of text on a web server, an object store and the hub, each behind a server that can be told to misbehave."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stablelm.data.formats.file_rows import documents
from stablelm.data.storage.options import ReadOptions
from support.fakehub import COMMIT, FakeHub
from support.httpserver import FaultyServer, serve
from support.stores import s3_server

TEXTS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=120)) + str(n) for n in range(2000)]
NAME = "en/c4-train.00000-of-00001.json.gz"
BLOCK = 8 << 10


def packed(texts: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


CONTENT = packed(TEXTS)


class Store:
    """A store behind a server that misbehaves; `put` replaces its file."""

    def __init__(self, server: FaultyServer, url: str, storage: dict, put: Callable[[bytes], object]):
        self.server, self.url, self.storage, self.put = server, url, storage, put

    def options(self, budget: float = 20.0) -> ReadOptions:
        return ReadOptions(retry_budget=budget, block=BLOCK, storage=self.storage)

    def documents(self, budget: float = 20.0):
        return documents([self.url], self.options(budget))


def stored(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The file in the store of this kind, which waits for its own retries hardly at all."""
    yield from {"http": http_store, "s3": s3_store, "hub": hub_store}[kind](folder, monkeypatch)


def http_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    path = tmp_path / Path(NAME).name
    path.write_bytes(CONTENT)
    with serve(tmp_path) as server:
        server.tags = True
        yield Store(server, f"{server.url}/{path.name}", {}, path.write_bytes)


def s3_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import fsspec
    import s3fs.core

    with s3_server() as variables, serve(upstream=variables["FSSPEC_S3_ENDPOINT_URL"]) as server:
        direct = fsspec.filesystem("s3")
        url = f"s3://bucket/{NAME}"
        direct.pipe_file(url, CONTENT)
        monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 2)
        yield Store(server, url, {"s3.endpoint_url": server.url}, lambda content: direct.pipe_file(url, content))


def hub_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with FakeHub({NAME: CONTENT}) as hub, serve(upstream=hub.url) as server:
        url = f"hf://datasets/allenai/c4@{COMMIT}/{NAME}"
        yield Store(server, url, {"hf.endpoint": server.url}, lambda content: hub.files.update({NAME: content}))


# The client of S3 repeats failed requests by itself, at its own pace.
STORES = ["http", pytest.param("s3", marks=pytest.mark.slow), "hub"]
