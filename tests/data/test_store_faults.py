"""Bad days of a web server, an object store and the hub: every document exactly once and in order, or DataError."""

import email.utils
import gzip
import io
import json
import random
import threading
import time
import types

import pytest
from support.fakehub import COMMIT, FakeHub
from support.httpserver import FaultyServer, serve
from support.stores import s3_server

from stablelm.data import retry, waiting
from stablelm.data.options import ReadOptions
from stablelm.data.source import documents
from stablelm.errors import DataError

TEXTS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=120)) + str(n) for n in range(2000)]
NAME = "en/c4-train.00000-of-00001.json.gz"
# Its client repeats failed requests by itself, at its own pace.
STORES = ["http", pytest.param("s3", marks=pytest.mark.slow), "hub"]
BLOCK = 8 << 10


def packed(texts: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


CONTENT = packed(TEXTS)


class Store:
    """A store behind a server that misbehaves; `put` replaces its file."""

    def __init__(self, server: FaultyServer, url: str, storage: dict, put):
        self.server, self.url, self.storage, self.put = server, url, storage, put

    def options(self, budget: float = 20.0) -> ReadOptions:
        return ReadOptions(retry_budget=budget, block=BLOCK, storage=self.storage)

    def documents(self, budget: float = 20.0):
        return documents([self.url], self.options(budget))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.1)


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    make = {"http": _http, "s3": _s3, "hub": _hub}[request.param]
    yield from make(tmp_path, request.getfixturevalue("monkeypatch"))


def _http(tmp_path, monkeypatch):
    path = tmp_path / "a.json.gz"
    path.write_bytes(CONTENT)
    with serve(tmp_path) as server:
        server.tags = True
        yield Store(server, f"{server.url}/a.json.gz", {}, path.write_bytes)


def _s3(tmp_path, monkeypatch):
    import fsspec
    import s3fs.core

    with s3_server() as variables, serve(upstream=variables["FSSPEC_S3_ENDPOINT_URL"]) as server:
        direct = fsspec.filesystem("s3")
        url = f"s3://bucket/{NAME}"
        direct.pipe_file(url, CONTENT)
        monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 2)
        yield Store(server, url, {"s3.endpoint_url": server.url}, lambda content: direct.pipe_file(url, content))


def _hub(tmp_path, monkeypatch):
    from huggingface_hub.utils import _http as client

    # The client's own waiting, which has no setting.
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.01), time=time.time))
    with FakeHub({NAME: CONTENT}) as hub, serve(upstream=hub.url) as server:
        url = f"hf://datasets/allenai/c4@{COMMIT}/{NAME}"
        yield Store(server, url, {"hf.endpoint": server.url}, lambda content: hub.files.update({NAME: content}))


def test_twenty_random_cuts(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.draw, store.server.cuts = random.Random(1), 20
    got += stream
    assert got == TEXTS
    assert store.server.cuts == 0


def test_an_object_store_that_fails_a_little(tmp_path, monkeypatch):
    for store in _s3(tmp_path, monkeypatch):
        stream = store.documents()
        got = [next(stream)]
        store.server.cuts, store.server.failures = 1, 1
        assert got + list(stream) == TEXTS
        assert (store.server.cuts, store.server.failures) == (0, 0)


@pytest.mark.parametrize("status", [500, 503])
def test_a_storm_of_server_errors(store, status):
    stream = store.documents()
    got = [next(stream)]
    store.server.draw, store.server.failures, store.server.status = random.Random(2), 12, status
    got += stream
    assert got == TEXTS
    assert store.server.failures == 0


def test_a_storm_of_too_many_requests_is_waited_for_as_asked(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.failures, store.server.status = 3, 429
    store.server.failure_headers = {"Retry-After": "0.3"}
    began = time.monotonic()
    got += stream
    assert got == TEXTS
    assert store.server.failures == 0
    if "hf" not in store.url:  # there its own client waits, not at all in this test
        assert time.monotonic() - began > 0.59, "s3's client repeats one request at once"


def test_an_outage(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.down = True
    threading.Timer(0.6, lambda: setattr(store.server, "down", False)).start()
    assert got + list(stream) == TEXTS


def test_a_server_that_restarts(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.stop()
    threading.Timer(0.6, store.server.start).start()
    assert got + list(stream) == TEXTS


def test_a_spent_budget_names_the_file(store):
    stream = store.documents(budget=0.5)
    got = [next(stream)]
    store.server.down = True
    with pytest.raises(DataError, match=rf"{store.url}: unreadable at byte \d+ for 0\.5 s .*data\.retry_budget"):
        got.extend(stream)
    assert got == TEXTS[: len(got)]


@pytest.mark.parametrize(
    "other", [packed(TEXTS[::-1])[: len(CONTENT)].ljust(len(CONTENT), b"\0"), CONTENT[:-5000], packed(TEXTS[:100])]
)
def test_a_file_that_is_changed_or_truncated_after_the_start(store, other):
    """On the hub a commit's files never change: there only what its bytes then say can be found."""
    stream = store.documents(budget=1.0)
    got = [next(stream)]
    store.put(other)
    with pytest.raises(DataError, match=r"changed|truncated|damaged|unreadable|416"):
        got.extend(stream)
    assert got == TEXTS[: len(got)], "what was given before is right"


def test_a_file_changed_between_two_epochs(store):
    if "hf" in store.url:
        pytest.skip("a commit's files never change")
    options = store.options()
    assert list(documents([store.url], options)) == TEXTS
    store.put(packed(TEXTS[::-1]))
    with pytest.raises(DataError, match=r"changed from .* while it was read; put the old file back"):
        list(documents([store.url], options))


# --- how long to wait, and saying so ---


class Refusal(OSError):
    def __init__(self, status: int, **headers: str):
        super().__init__(f"{status} answered")
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Refusal(429, Retry_After="7"), 7),
        (Refusal(503, retry_after="7"), 7),
        (Refusal(429, RateLimit='"api";r=0;t=55'), 55),
        (Refusal(429, RateLimit="limit=10, remaining=0, reset=50"), 50),
        (Refusal(429, RateLimit_Reset="9"), 9),
        (Refusal(200, RateLimit='"api";r=3;t=55'), None),
        (Refusal(429, Retry_After="soon"), None),
        (Refusal(429), None),
        (OSError("reset by peer"), None),
    ],
)
def test_what_a_store_asks_for(error, seconds):
    assert retry.asked_seconds(error) == seconds


def test_a_date_to_come_back_at():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (retry.asked_seconds(Refusal(503, Retry_After=date)) or 0) <= 30
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert retry.asked_seconds(Refusal(503, Retry_After=past)) == 0


def test_botocores_and_wrapped_answers():
    cause = Exception("ClientError")
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}}}  # type: ignore
    slow = OSError("SlowDown")
    slow.__cause__ = cause
    assert (retry.http_status(slow), retry.asked_seconds(slow)) == (503, 3)


def test_the_budget_bounds_what_a_store_asks_for():
    def refuse():
        raise Refusal(429, Retry_After="3600")

    began = time.monotonic()
    with pytest.raises(DataError, match=r"f: unreadable for 0\.3 s \(429 answered\)"):
        retry.persist(refuse, name="f", budget=0.3)
    assert 0.25 < time.monotonic() - began < 3


def test_who_waits_is_known_and_said(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_LINE", 0.3)
    monkeypatch.setattr(waiting, "NEXT_LINES", 0.4)
    monkeypatch.setenv("RANK", "5")
    said = io.StringIO()
    monkeypatch.setattr(waiting.sys, "stderr", said)
    ready = time.monotonic() + 1.5
    seen = []

    def attempt():
        seen.extend(waiting.waiting())
        if time.monotonic() < ready:
            raise OSError("connection reset")
        return "bytes"

    assert retry.persist(attempt, name="https://h/a.json.gz", budget=10) == "bytes"
    assert waiting.waiting() == []
    assert {wait.file for wait in seen} == {"https://h/a.json.gz"}
    assert [wait.attempt for wait in seen] == list(range(2, len(seen) + 2))
    assert seen[0].cause == "connection reset"
    assert abs(seen[0].since - time.time()) < 60
    lines = said.getvalue().splitlines()
    assert 2 <= len(lines) <= 4, "after the first while and then again at times"
    assert lines[0].startswith("rank 5: waiting for https://h/a.json.gz: 0 s, attempt ")
    assert lines[0].endswith("last failure: connection reset")


def test_many_waits_are_one_line():
    waits = [waiting.Wait(f"f{n}", n + 1, time.time() - 20 + n, "gone") for n in range(3)]
    assert "waiting for f0 and 2 more reads: 20 s, attempt 1" in waiting.line(waits)
