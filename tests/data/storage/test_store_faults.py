"""Bad days of a web server, an object store and the hub: every document exactly once and in order, or DataError."""

import email.utils
import io
import random
import threading
import time

import pytest
from support.faulty_stores import TEXTS, stored

from stablelm.data.storage import retry, stall_monitor
from stablelm.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_twenty_random_cuts(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.draw, store.server.cuts = random.Random(1), 20
    got += stream
    assert got == TEXTS
    assert store.server.cuts == 0


def test_an_object_store_that_fails_a_little(tmp_path, monkeypatch):
    for store in stored("s3", tmp_path, monkeypatch):
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
    assert time.monotonic() - began > 0.59, "s3's client repeats one request at once"


def test_an_outage(store):
    stream = store.documents()
    got = [next(stream)]
    store.server.down = True
    threading.Timer(0.6, lambda: setattr(store.server, "down", False)).start()
    assert got + list(stream) == TEXTS


@pytest.mark.slow
def test_an_outage_of_half_a_minute(store, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.25)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 30.0)
    stream = store.documents(budget=120.0)
    got = [next(stream)]
    store.server.down = True
    threading.Timer(30, lambda: setattr(store.server, "down", False)).start()
    began = time.monotonic()
    assert got + list(stream) == TEXTS
    assert 29 < time.monotonic() - began < 100


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
    monkeypatch.setattr(stall_monitor, "FIRST_LINE", 0.3)
    monkeypatch.setattr(stall_monitor, "NEXT_LINES", 0.4)
    monkeypatch.setenv("RANK", "5")
    said = io.StringIO()
    monkeypatch.setattr(stall_monitor.sys, "stderr", said)
    ready = time.monotonic() + 1.5
    seen = []

    def attempt():
        seen.extend(stall_monitor.waiting())
        if time.monotonic() < ready:
            raise OSError("connection reset")
        return "bytes"

    assert retry.persist(attempt, name="https://h/a.json.gz", budget=10) == "bytes"
    assert stall_monitor.waiting() == []
    assert {wait.file for wait in seen} == {"https://h/a.json.gz"}
    assert [wait.attempt for wait in seen] == list(range(2, len(seen) + 2))
    assert seen[0].cause == "connection reset"
    assert abs(seen[0].since - time.time()) < 60
    lines = said.getvalue().splitlines()
    assert 2 <= len(lines) <= 4, "after the first while and then again at times"
    assert lines[0].startswith("rank 5: waiting for https://h/a.json.gz: 0 s, attempt ")
    assert lines[0].endswith("last failure: connection reset")


def test_many_waits_are_one_line():
    waits = [stall_monitor.Wait(f"f{n}", n + 1, time.time() - 20 + n, "gone") for n in range(3)]
    assert "waiting for f0 and 2 more reads: 20 s, attempt 1" in stall_monitor.line(waits)
