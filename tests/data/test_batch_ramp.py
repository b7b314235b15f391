"""A batch size that changes: samples in the defined order, whatever the ranks, workers, stores and resumes."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, write_corpus
from support.prepared import write_shards
from test_order_everywhere import LANES, SEQ_LEN, close, union

from stablelm.config.mixture import sources
from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.data.mixture import Mixture

WORLDS, STEPS = (1, 2, 3, 4, 6), 12
MIXTURES = {
    "one source": {},
    "mixture": {"web.path": "w", "web.weight": 3, "code.path": "c", "code.weight": 1, "code.weight.4": 3},
}
SIZES = st.sampled_from([12, 24, 36, 60])
RAMPS = st.tuples(SIZES, st.dictionaries(st.integers(1, STEPS + 2), SIZES, max_size=3)).map(
    lambda drawn: {0: drawn[0], **drawn[1]}
)
SETUP = st.tuples(st.sampled_from(WORLDS), st.sampled_from((0, 1, 3)), st.booleans())


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[bool, dict[str, list[str]]]:
    """Two sources, as text (False) and as shards (True)."""
    text, shards = {}, {}
    for name, rows in (("web", [40, 33, 46]), ("code", [26, 30])):
        folder = tmp_path_factory.mktemp(name)
        text[name] = write_corpus(folder, rows)
        shards[name] = write_shards(text[name], folder / "prepared")
    return {False: text, True: shards}


def options(mixture: dict, packing: Any, workers: int = 0) -> DataConfig:
    return DataConfig(
        seq_len=SEQ_LEN, lanes=LANES, shuffle_block=4, mixture=mixture, packing=packing, workers=workers
    )  # fmt: skip


@pytest.fixture(scope="module", params=["split", "best_fit"])
def windows(request, corpora) -> tuple[str, dict[str, list[list]]]:
    """(packing, each source's windows alone by source, turn of the lanes and lane), enough of them."""
    found: dict[str, list[list]] = {}
    for name, files in corpora[False].items():
        data = options({f"{name}.path": "p", f"{name}.weight": 1}, request.param)
        loader = Loader({name: files}, LetterTokenizer(), data, seed=5, global_batch_size=LANES)
        found[name] = [loader.next().tokens.tolist() for _ in range(STEPS * 60 // LANES + 1)]
        close([loader])
    return request.param, found


def defined(ramp: dict[int, int], mixture: dict, alone: dict[str, list[list]]) -> list[list]:
    """Rows of each step, by the definition: sample n is the next window of lane n mod Λ in its source."""
    mixed, used, sample, steps = Mixture.of(sources(options(mixture, "split")), seed=5), Counter(), 0, []
    for step in range(STEPS):
        size = ramp[max(first for first in ramp if first <= step)]
        rows = []
        for n in range(sample, sample + size):
            name, lane = mixed.source(n, step) if mixture else "web", n % LANES
            rows.append(alone[name][used[name, lane]][lane])
            used[name, lane] += 1
        steps.append(rows)
        sample += size
    return steps


def start(corpora, setup: tuple[int, int, bool], ramp, mixture: dict, packing: str, state: dict | None) -> list[Loader]:
    (world, workers, prepared), loaders = setup, []
    files = corpora[prepared] if mixture else corpora[prepared]["web"]
    # A source's name is in the key of its order, so a single one has the same name here.
    files, mixture = (files, mixture) if mixture else ({"web": files}, {"web.path": "p", "web.weight": 1})
    for rank in range(world):
        data = options(mixture, packing, workers)
        each = Loader(
            files, LetterTokenizer(), data, seed=5, global_batch_size=ramp, rank=rank, world_size=world
        )  # fmt: skip
        if state is not None:
            each.load(json.loads(json.dumps(state)))
        loaders.append(each)
    return loaders


def read(loaders: list[Loader], steps: int) -> list[list]:
    """Rows of each step in global order."""
    got = []
    for _ in range(steps):
        parts = [each.next().tokens.tolist() for each in loaders]
        rows: list = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            rows[rank :: len(loaders)] = part
        got.append(rows)
    return got


@pytest.mark.parametrize("mixture", MIXTURES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ramp=RAMPS, turns=st.lists(st.tuples(SETUP, st.integers(1, 6)), min_size=2, max_size=4))
def test_any_history_of_resumes_gives_the_defined_order(corpora, windows, mixture, ramp, turns):
    packing, alone = windows
    expected, done, state = defined(ramp, MIXTURES[mixture], alone), 0, None
    for setup, count in turns:
        count = min(count, STEPS - done)
        loaders = start(corpora, setup, ramp, MIXTURES[mixture], packing, state)
        assert read(loaders, count) == expected[done : done + count]
        done, state = done + count, union(loaders)
        close(loaders)
        assert state["data_step"] == done


def test_a_single_source_without_a_name_takes_the_same_slices(corpora):
    """As most runs have it: batches are consecutive slices of one sequence of windows."""
    files, data = corpora[False]["web"], options({}, "split", workers=2)
    steady = Loader(files, LetterTokenizer(), data, seed=5, global_batch_size=LANES)
    rows = [row for _ in range(6) for row in steady.next().tokens.tolist()]
    ramp = Loader(files, LetterTokenizer(), data, seed=5, global_batch_size={0: 6, 2: 18, 5: 60})
    found = [ramp.next() for _ in range(6)]
    assert [len(batch.tokens) for batch in found] == [6, 6, 18, 18, 18, 60]
    assert [row for batch in found for row in batch.tokens.tolist()] == rows[:126]
    close([steady, ramp])


def test_a_jump_passes_over_whole_batches_of_their_own_size(corpora):
    files, data = corpora[False]["web"], options({}, "split")
    ramp = {0: 6, 2: 18, 5: 60}
    whole, jumping = (Loader(files, LetterTokenizer(), data, seed=5, global_batch_size=ramp) for _ in range(2))
    expected = [whole.next().tokens.tolist() for _ in range(7)]
    jumping.skip([[1, 4]])
    assert [jumping.next().tokens.tolist() for _ in range(3)] == [expected[step] for step in (0, 5, 6)]
    close([whole, jumping])
