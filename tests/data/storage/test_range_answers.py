"""What a store sends for a range is believed only where everything it says fits: else DataError, and nothing wrong."""

import gzip
import time

import pytest
from support.faulty_stores import CONTENT, NAME, TEXTS
from support.httpserver import serve
from support.range_faults import FAULTS

from stablelm.data.formats.file_rows import documents
from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_answer_that_is_not_what_was_asked_for(store, fault):
    if fault is FAULTS["more bytes without a length"] and store.url.startswith("s3"):
        pytest.skip("S3's client reads no body without a length")
    stream = store.documents(budget=1.0)
    got = [next(stream)]
    fault(store.server)
    with pytest.raises(DataError, match=store.url) as caught:
        got.extend(stream)
    assert "unreadable" not in str(caught.value), "nothing to try again"
    assert got == TEXTS[: len(got)], "what was given before is right"


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_range_that_is_shifted_in_plain_text_or_from_the_start(tmp_path, name):
    text = gzip.decompress(CONTENT)
    (tmp_path / name).write_bytes(CONTENT if name.endswith(".gz") else text)
    for already in (0, 1):
        with serve(tmp_path) as server:
            stream = documents([f"{server.url}/{name}"], ReadOptions(retry_budget=0.5, block=8 << 10))
            got = [next(stream) for _ in range(already)]
            FAULTS["shifted, which Content-Range denies"](server)
            with pytest.raises(DataError, match=f"{name}: changed while it was read, the store sent other bytes"):
                got.extend(stream)
            assert got == TEXTS[: len(got)]


def test_stored_gzip_that_is_labelled_as_such_is_read_as_it_is(tmp_path):
    """Apache says Content-Encoding: x-gzip of files named .gz."""
    (tmp_path / "a.json.gz").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        server.twist = lambda status, headers, body, asked: (status, {**headers, "Content-Encoding": "x-gzip"}, body)
        assert list(documents([f"{server.url}/a.json.gz"], ReadOptions(block=8 << 10))) == TEXTS


def test_a_server_that_trickles_is_given_up(store, monkeypatch):
    """Any byte kept the connection alive: two minutes a kilobyte went without a word."""
    monkeypatch.setattr(stores, "STALL_SECONDS", 0.3)
    stream = store.documents(budget=1.0)
    next(stream)
    store.server.trickle, began = (64, 0.05), time.monotonic()
    if store.url.startswith("s3"):
        pytest.skip("the server between reads the whole body first")
    with pytest.raises(DataError, match=r"unreadable at byte \d+ for 1 s \(only \d+ bytes in 0.3 s\)"):
        list(stream)
    assert time.monotonic() - began < 10


def test_an_address_that_is_signed_for_get_alone(tmp_path):
    (tmp_path / NAME.rsplit("/", 1)[1]).write_bytes(CONTENT)
    with serve(tmp_path) as server:

        def refuse_head(request: str) -> None:
            server.failures, server.status = int(request.startswith("HEAD")), 403

        server.before = refuse_head
        assert list(documents([f"{server.url}/{NAME.rsplit('/', 1)[1]}"], ReadOptions(block=8 << 10))) == TEXTS
