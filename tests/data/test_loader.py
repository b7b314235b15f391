"""Batches: one order for every world size and worker count, exact resume at every step, clean failures."""

import gzip
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.httpserver import serve
from support.letters import LetterTokenizer, write_corpus, write_rows
from support.samples import shared_data

from stablelm.config.schema import DataConfig
from stablelm.data.formats import file_rows
from stablelm.data.loader import Batch, Loader
from stablelm.data.storage import retry
from stablelm.errors import DataError

LANES, BATCH, SEQ_LEN = 24, 36, 16
ROWS = [40, 0, 90, 61, 33]


@pytest.fixture
def files(tmp_path):
    return write_corpus(tmp_path, ROWS)


def loader(files, *, world=1, rank=0, workers=0, lanes=LANES, batch=BATCH, **data) -> Loader:
    config = DataConfig(seq_len=SEQ_LEN, lanes=lanes, shuffle_block=4, workers=workers, retry_budget=0.2, **data)
    return Loader(files, LetterTokenizer(), config, seed=5, global_batch_size=batch, rank=rank, world_size=world)


def global_steps(loaders: list[Loader], steps: int) -> list[list]:
    """Rows of each step in global order, from the loaders of all ranks."""
    got = []
    for _ in range(steps):
        batches = [each.next() for each in loaders]
        rows: list = [None] * (len(loaders) * len(batches[0].tokens))
        for rank, batch in enumerate(batches):
            pairs = zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
            rows[rank :: len(loaders)] = list(pairs)
        got.append([batches[0].data_step, *rows])
    return got


def world(files, size: int, state=None, **options) -> list[Loader]:
    loaders = [loader(files, world=size, rank=rank, **options) for rank in range(size)]
    for each in loaders:
        if state is not None:
            each.load(state)
    return loaders


def union(loaders: list[Loader]) -> dict:
    """What a checkpoint holds: the lanes of all ranks."""
    states = [each.state() for each in loaders]
    assert len({state["data_step"] for state in states}) == 1
    return {"data_step": states[0]["data_step"], "lanes": {k: v for state in states for k, v in state["lanes"].items()}}


def finish(loaders: list[Loader]) -> None:
    for each in loaders:
        each.close()


def test_a_batch_is_tokens_and_targets_one_place_on(files):
    batch = loader(files, batch=4).next()
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == batch.targets.shape == (4, SEQ_LEN)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_is_one_for_every_world_size_and_worker_count(files, size, workers):
    loaders = world(files, size, workers=workers)
    assert global_steps(loaders, 12) == global_steps(world(files, 1), 12)
    finish(loaders)


def test_sample_n_is_of_lane_n(files):
    # A batch that is no multiple of the lanes: sample n must still be the next window of lane n mod lanes.
    seen: dict[int, list] = {}
    for step, *rows in global_steps([loader(files)], 6):
        for row, (tokens, _) in enumerate(rows):
            seen.setdefault((step * BATCH + row) % LANES, []).append(tokens)
    steps = global_steps([loader(files, batch=LANES)], 9)
    for lane, windows in seen.items():
        assert windows == [rows[lane][0] for _, *rows in steps]


def test_consecutive_windows_of_a_lane_predict_each_token_once(files):
    steps = global_steps([loader(files, batch=LANES)], 20)
    for lane in range(LANES):
        for (_, *before), (_, *after) in itertools.pairwise(steps):
            assert before[lane][1][-1] == after[lane][0][0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_resume_at_every_step_twice_with_other_world_sizes(files, steps, workers):
    whole = global_steps([loader(files)], steps + 9)
    first = world(files, 2, workers=workers)
    got = global_steps(first, steps)
    second = world(files, 3, union(first), workers=workers)
    got += global_steps(second, 3)
    third = world(files, 1, union(second), workers=workers)
    got += global_steps(third, 6)
    assert got == whole
    for loaders in (first, second, third):
        finish(loaders)


def test_resume_across_epochs(files):
    # 224 documents of about 30 tokens are some 12 batches of 576 tokens: 60 steps are about five epochs.
    whole = loader(files)
    reference = global_steps([whole], 60)
    assert max(epoch for epoch, *_ in whole.state()["lanes"].values()) >= 3
    got, state = [], None
    for size in (1, 4, 2, 3, 1, 2):
        loaders = world(files, size, state, workers=1)
        got += global_steps(loaders, 10)
        state = union(loaders)
        finish(loaders)
    assert got == reference
    assert state == whole.state()


@pytest.mark.parametrize("held", [0, 500])
def test_order_does_not_depend_on_the_memory_for_shared_files(files, monkeypatch, held):
    reference = global_steps([loader(files)], 30)
    monkeypatch.setattr(file_rows, "HELD_BYTES", held)
    assert global_steps([loader(files)], 30) == reference


def test_state_is_of_batches_handed_out(files):
    ahead = loader(files, workers=2, prefetch=4)
    plain = loader(files)
    assert ahead.state() == {"data_step": 0, "lanes": {}}
    for _ in range(3):
        ahead.next()
        plain.next()
        time.sleep(0.05)
        assert ahead.state() == plain.state()
    assert all(len(cursor) == 5 for cursor in plain.state()["lanes"].values())
    ahead.close()


def test_workers_stay_within_the_prefetch(files):
    encoded = []

    class Counting(LetterTokenizer):
        def encode_arrays(self, texts, *, threads=1):
            encoded.extend(texts)
            return [np.ones(SEQ_LEN, np.int32) for _ in texts]

    config = DataConfig(seq_len=SEQ_LEN, lanes=6, shuffle_block=4, workers=2, prefetch=2)
    each = Loader(files, Counting(), config, seed=1, global_batch_size=6)
    each.next()
    time.sleep(0.3)
    # Every window is one document, the first of a lane two: 3 batches of 6 rows and one more a lane, and of each
    # lane what is left of a block and another one.
    assert 3 * 6 + 6 <= len(encoded) <= 3 * 6 + 6 + 6 * (3 + 4)
    before = len(encoded)
    time.sleep(0.2)
    each.close()
    assert len(encoded) == before


def test_load_after_batches_goes_back(files):
    each = loader(files, workers=1)
    global_steps([each], 2)
    state = each.state()
    again = global_steps([each], 3)
    each.load(state)
    assert global_steps([each], 3) == again
    each.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_comes_with_the_batch_it_belongs_to(tmp_path, workers):
    before = set(threading.enumerate())
    good = write_corpus(tmp_path, [30, 30])
    # 40 letters and eos are about 2.5 windows: row 9 is needed after some batches only.
    bad = Path(write_rows(tmp_path / "bad.json", ["y" * 40] * 9))
    bad.write_text(bad.read_text() + "not json\n")
    each = loader([str(bad), *good], workers=workers, lanes=3, batch=3)
    with pytest.raises(DataError, match=r"bad\.json, line 10: not valid JSON"):
        global_steps([each], 100)
    steps = each.state()["data_step"]
    assert steps >= 1
    reference = loader([str(bad), *good], lanes=3, batch=3)
    global_steps([reference], steps)
    assert each.state() == reference.state()
    reference.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("data-")]


def test_a_truncated_file_ends_the_run_with_its_name(tmp_path):
    (file,) = write_corpus(tmp_path, [300])
    packed = gzip.compress(Path(file).read_bytes())
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(packed[:-30])
    each = loader([str(broken)], workers=1, lanes=2, batch=2)
    with pytest.raises(DataError, match=r"broken\.json\.gz: truncated"):
        global_steps([each], 1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_are_passed_over_and_the_others_stay_as_they_are(files, workers):
    whole, some = loader(files), loader(files, workers=workers)
    some.skip([(1, 2), [4, 1]])
    batches = [whole.next() for _ in range(7)]
    found = [some.next() for _ in range(3)]
    assert [batch.data_step for batch in found] == [0, 3, 5]
    assert all(torch.equal(batch.tokens, batches[batch.data_step].tokens) for batch in found)
    some.skip([])
    assert torch.equal(some.next().tokens, batches[6].tokens)
    assert some.state() == whole.state()
    some.close()


def test_close_does_not_wait_for_a_store_that_is_down(tmp_path):
    with serve(tmp_path) as server:
        server.down = True
        config = DataConfig(seq_len=SEQ_LEN, lanes=4, workers=1, retry_budget=20)
        each = Loader([f"{server.url}/a.json"], LetterTokenizer(), config, seed=1, global_batch_size=4)
        closing = threading.Timer(0.3, each.close)
        closing.start()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="closed"):
            each.next()
        closing.join()
        assert time.monotonic() - began < 5


def test_remote_and_local_files_are_the_same_data(tmp_path, files, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    with serve(tmp_path) as server:
        urls = [f"{server.url}/{Path(file).name}" for file in files if Path(file).stat().st_size]
        local = [file for file in files if Path(file).stat().st_size]
        server.cuts, server.cut_after = 2, 100
        remote = loader(urls, workers=2)
        assert global_steps([remote], 8) == global_steps([loader(local)], 8)
        remote.close()
        assert server.cuts == 0


def test_wait_seconds_counts_the_last_next(files):
    class Slow(LetterTokenizer):
        def encode_arrays(self, texts, *, threads=1):
            time.sleep(0.01)
            return super().encode_arrays(texts)

    config = DataConfig(seq_len=SEQ_LEN, lanes=4, workers=1)
    each = Loader(files, Slow(), config, seed=1, global_batch_size=4)
    each.next()
    assert each.wait_seconds > 0.01
    time.sleep(0.5)
    each.next()
    assert each.wait_seconds < 0.01
    each.close()


def test_real_documents_of_every_world_size():
    from stablelm.tokenizers import load_tokenizer

    folder = shared_data("c4/en")
    tokenizer = load_tokenizer(shared_data("tokenizers/t5-32k-unigram.model"))
    files = [str(file) for file in folder.glob("c4-train*.json.gz")]
    config = DataConfig(seq_len=64, lanes=12, workers=1)

    def steps(size: int) -> list[list]:
        loaders = [
            Loader(files, tokenizer, config, seed=0, global_batch_size=12, rank=rank, world_size=size)
            for rank in range(size)
        ]
        got = global_steps(loaders, 4)
        finish(loaders)
        return got

    assert steps(1) == steps(3) == steps(4)
