"""One order for every world size, worker count, kind of storage and history of resumes."""

import gzip
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, write_corpus
from support.prepared import write_shards

from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader

WORLDS, WORKERS = (1, 2, 3, 4, 6, 8), (0, 1, 2, 4)
LANES = BATCH = 24
SEQ_LEN = 16
SETUP = st.tuples(st.sampled_from(WORLDS), st.sampled_from(WORKERS), st.booleans())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[bool, list[str]]:
    """The same 119 documents as text (False) and as shards (True): an epoch is some nine steps.

    Between them are rows that hold none: in one file every second is empty, in another some are cut off.
    """
    folder = tmp_path_factory.mktemp("corpus")
    text = write_corpus(folder, [40, 0, 33, 46])
    for file, other, every in ((text[0], '{"text": ""}', 1), (text[3], '{"text": "cut', 5)):
        opened = gzip.open if file.endswith(".gz") else open
        with opened(file, "rt") as before:
            lines = before.read().splitlines()
        with opened(file, "wt") as after:
            for number, line in enumerate(lines):
                after.write(line + "\n" + (other + "\n" if number % every == 0 else ""))
    return {False: text, True: write_shards(text, folder / "prepared")}


def start(files: list[str], world: int, workers: int, packing: Any, state: dict | None) -> list[Loader]:
    loaders = []
    for rank in range(world):
        data = DataConfig(
            seq_len=SEQ_LEN, lanes=LANES, shuffle_block=4, workers=workers, packing=packing, bad_rows="skip"
        )
        each = Loader(
            files, LetterTokenizer(), data, seed=5, global_batch_size=BATCH, rank=rank, world_size=world, documents=True
        )
        if state is not None:
            each.load(json.loads(json.dumps(state)))
        loaders.append(each)
    return loaders


def read(loaders: list[Loader], steps: int) -> list[list]:
    """Rows of each step in global order."""
    got = []
    for _ in range(steps):
        rows: list = [None] * BATCH
        for rank, each in enumerate(loaders):
            batch = each.next()
            assert batch.documents is not None
            parts = (batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist())
            rows[rank :: len(loaders)] = list(zip(*parts, strict=True))
        got.append(rows)
    return got


def union(loaders: list[Loader]) -> dict:
    """What a checkpoint holds."""
    states = [each.state() for each in loaders]
    return {"data_step": states[0]["data_step"], "lanes": {k: v for state in states for k, v in state["lanes"].items()}}


def close(loaders: list[Loader]) -> None:
    for each in loaders:
        each.close()


@pytest.fixture(scope="module", params=["split", "best_fit"])
def reference(request, corpus) -> tuple[str, list[list], list[dict]]:
    """(packing, batches of 40 steps, state before each) of one process without threads on text."""
    loaders, steps, states = start(corpus[False], 1, 0, request.param, None), [], []
    for _ in range(40):
        states.append(union(loaders))
        steps += read(loaders, 1)
    assert max(epoch for epoch, *_ in states[-1]["lanes"].values()) >= 3
    return request.param, steps, states


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_order_is_one(corpus, reference, world, workers, prepared):
    packing, steps, states = reference
    loaders = start(corpus[prepared], world, workers, packing, None)
    assert read(loaders, 6) == steps[:6]
    assert union(loaders) == states[6]
    close(loaders)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(SETUP, st.integers(1, 9)), min_size=3, max_size=5))
def test_any_history_of_resumes_gives_the_same_batches(corpus, reference, turns):
    packing, steps, states = reference
    done, state = 0, None
    for (world, workers, prepared), count in turns:
        count = min(count, len(steps) - 1 - done)
        loaders = start(corpus[prepared], world, workers, packing, state)
        assert read(loaders, count) == steps[done : done + count]
        done, state = done + count, union(loaders)
        close(loaders)
        assert state == states[done]


@pytest.mark.parametrize("prepared", [False, True])
def test_resume_at_every_step_twice_in_a_row(corpus, reference, prepared):
    packing, steps, states = reference
    for step in range(1, len(steps) - 2):
        first = start(corpus[prepared], 2, 0, packing, states[step])
        assert read(first, 1) == steps[step : step + 1]
        second = start(corpus[not prepared], 3, 0, packing, union(first))
        assert read(second, 1) == steps[step + 1 : step + 2]
        assert union(second) == states[step + 2]
