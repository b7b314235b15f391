"""Files that are bad from the beginning or go bad later, in every store: named, and nothing wrong is given."""

import gzip
import json
from pathlib import Path

import pytest
from support.faulty_stores import BLOCK, CONTENT, NAME, TEXTS, packed
from support.letters import LetterTokenizer

from stablelm.config.schema import DataConfig
from stablelm.data import inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.loader import Loader
from stablelm.data.storage import options
from stablelm.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(options, "LARGEST_BLOCK", BLOCK)


OTHERS = {
    "other text of this size": packed(TEXTS[::-1])[: len(CONTENT)].ljust(len(CONTENT), b"\0"),
    "truncated": CONTENT[:-5000],
    "shorter": packed(TEXTS[:100]),
}
WRONG = "changed|truncated|damaged|unreadable|416"


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_file_that_is_changed_or_truncated_after_the_start(store, other):
    """On the hub a commit's files never change: there only what its bytes then say can be found."""
    stream = store.documents(budget=1.0)
    got = [next(stream)]
    store.put(other)
    with pytest.raises(DataError, match=rf"{store.url}.*({WRONG})"):
        got.extend(stream)
    assert got == TEXTS[: len(got)], "what was given before is right"


def test_a_file_changed_between_two_epochs(store):
    if "hf" in store.url:
        pytest.skip("a commit's files never change")
    reading = store.options()
    assert list(documents([store.url], reading)) == TEXTS
    store.put(packed(TEXTS[::-1]))
    with pytest.raises(DataError, match=r"changed from .* while it was read; put the old file back"):
        list(documents([store.url], reading))


def loader(url: str, storage: dict) -> Loader:
    data = DataConfig(seq_len=64, lanes=4, shuffle_block=16, workers=1, retry_budget=1.0, storage=storage)
    return Loader([url], LetterTokenizer(), data, seed=0, global_batch_size=4)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_last_good_state_goes_on_exactly_when_the_file_is_back(store, other, tmp_path):
    copy = tmp_path / "copy" / Path(NAME).name
    copy.parent.mkdir()
    copy.write_bytes(CONTENT)
    undisturbed, disturbed = loader(str(copy), {}), loader(store.url, store.storage)
    for _ in range(5):
        assert disturbed.next().tokens.equal(undisturbed.next().tokens)
    store.put(other)
    good, batches = disturbed.state(), []

    def read_on():
        nonlocal good
        while len(batches) < 2000:
            batches.append(disturbed.next().tokens)
            good = disturbed.state()

    with pytest.raises(DataError, match=rf"{store.url}.*({WRONG})"):
        read_on()
    assert all(batch.equal(undisturbed.next().tokens) for batch in batches), "what was given before is right"
    assert disturbed.state() == good
    store.put(CONTENT)
    resumed, again = loader(store.url, store.storage), loader(str(copy), {})
    resumed.load(good)
    again.load(good)
    for _ in range(30):
        assert resumed.next().tokens.equal(again.next().tokens)
    for each in (undisturbed, resumed, again):
        each.close()


BAD = {
    "truncated": (CONTENT[:-5000], "truncated"),
    "other text in the middle": (CONTENT[:9000] + CONTENT[:-9000], "damaged"),
    "not gzip": (gzip.decompress(CONTENT), "holds plain data, but its name says gzip"),
    "not JSON": (gzip.compress(b"<html>\n"), "line 1: not valid JSON"),
    "no text": (gzip.compress(json.dumps({"body": "a"}).encode()), "line 1: without a string under 'text'"),
    "no document": (gzip.compress(b"\n"), "holds no document"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_file_that_is_bad_before_the_start(store, content, says):
    store.put(content)
    with pytest.raises(ConfigError, match=f"data.path: .*{says}") as caught:
        inspection.check_remote([store.url], key="data.path", options=store.options(budget=1.0))
    assert store.url in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_file_that_is_not_there(store):
    absent = store.url.replace("00000-of", "00007-of")
    with pytest.raises(ConfigError, match=f"data.path: {absent}: .*(no longer exists|404)"):
        inspection.check_remote([store.url, absent], key="data.path", options=store.options(budget=1.0))


def test_good_files_and_local_ones_pass(store):
    inspection.check_remote([store.url, "/nowhere/local.json.gz"], key="data.path", options=store.options(budget=1.0))
    store.server.failures = 2
    inspection.check_remote([store.url], key="data.path", options=store.options())
    inspection.check_remote([], key="data.path", options=store.options())
