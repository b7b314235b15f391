"""Several sources: shares of any stretch, stages, one order for all world sizes and resumes, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, write_corpus
from test_order_everywhere import BATCH, LANES, SEQ_LEN, close, read, union

from stablelm.config import rules
from stablelm.config.load import dump, load
from stablelm.config.mixture import Source, sources
from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.data.mixture import Mixture
from stablelm.errors import ConfigError

MIXTURE = {"web.path": "w", "web.weight": 3, "code.path": "c", "code.weight": 1, "code.weight.8": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, list[str]]:
    """Two sources whose files have the same names; code is the smaller and its letters are marked."""
    found = {}
    for name, rows in (("web", [40, 33, 46]), ("code", [26, 30])):
        folder = tmp_path_factory.mktemp(name)
        found[name] = write_corpus(folder, rows)
    return found


def start(corpus, world: int = 1, state: dict | None = None, **data: Any) -> list[Loader]:
    loaders = []
    for rank in range(world):
        config = DataConfig(seq_len=SEQ_LEN, lanes=LANES, shuffle_block=4, mixture=MIXTURE, **{"workers": 0, **data})
        each = Loader(
            corpus,
            LetterTokenizer(),
            config,
            seed=5,
            global_batch_size=BATCH,
            rank=rank,
            world_size=world,
            documents=True,
        )
        if state is not None:
            each.load(json.loads(json.dumps(state)))
        loaders.append(each)
    return loaders


@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 99),
    first=st.integers(0, 10**9),
)
@settings(max_examples=50, deadline=None)
def test_shares_of_any_stretch_are_near_the_weights(weights, seed, first):
    mixture = Mixture.of({str(n): Source("p", {0: weight}) for n, weight in enumerate(weights)}, seed=seed)
    count = 500
    drawn = [int(mixture.source(sample, 0)) for sample in range(first, first + count)]
    for number, weight in enumerate(weights):
        assert abs(drawn.count(number) - count * weight / sum(weights)) <= 8
        assert weight or number not in drawn


def test_stages_hold_from_their_step_on():
    mixture = Mixture.of({"a": Source("p", {0: 1.0}), "b": Source("p", {10: 1.0, 20: 0.0})}, seed=0)
    told = {step: {mixture.source(sample, step) for sample in range(50)} for step in (0, 9, 10, 19, 20)}
    assert told == {0: {"a"}, 9: {"a"}, 10: {"a", "b"}, 19: {"a", "b"}, 20: {"a"}}
    assert mixture.shares(40) == pytest.approx({"a": 0.875, "b": 0.125})
    assert mixture.shares(10) == pytest.approx({"a": 1.0, "b": 0.0})


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_one_order_for_all_world_sizes_workers_and_resumes(corpus, packing):
    whole = start(corpus, packing=packing)
    expected, states = [], []
    for _ in range(20):
        states.append(union(whole))
        expected += read(whole, 1)
    assert set(states[-1]["lanes"]["0"]) == {"web", "code"}
    assert whole[0].epochs()["code"] > whole[0].epochs()["web"] > 0
    for world, workers, step in ((2, 0, 0), (8, 2, 3), (3, 1, 7), (4, 4, 13), (1, 2, 19)):
        parts = start(corpus, world, states[step], packing=packing, workers=workers)
        middle = min(step + 2, 20)
        assert read(parts, middle - step) == expected[step:middle]
        state = union(parts)
        close(parts)
        again = start(corpus, 6, state, packing=packing)
        assert read(again, 20 - middle) == expected[middle:]
        close(again)
    close(whole)


def test_a_source_is_read_as_it_would_be_alone(corpus):
    """Row by row of its lane, whatever the other sources are."""
    mixed = read(start(corpus), 12)
    alone = Loader(
        {"web": corpus["web"]},
        LetterTokenizer(),
        DataConfig(
            seq_len=SEQ_LEN, lanes=LANES, shuffle_block=4, workers=0, mixture={"web.path": "w", "web.weight": 1}
        ),
        seed=5, global_batch_size=BATCH, documents=True,
    )  # fmt: skip
    only = read([alone], 12)
    mixture = Mixture.of(sources(DataConfig(mixture=MIXTURE)), seed=5)
    for lane in range(LANES):
        found = [mixed[step][lane] for step in range(12) if mixture.source(step * BATCH + lane, step) == "web"]
        assert found == [only[step][lane] for step in range(len(found))]
        assert 4 <= len(found) <= 11


def test_configuration_comes_back():
    loaded = load(
        [],
        ["train.steps=1", "data.mixture={web: {path: [a, b], weight: 0.8}, code: {path: c, weight: {0: 0.2, 9: 1}}}"],
    )
    found = sources(loaded.config.data)
    assert found == {"web": Source(["a", "b"], {0: 0.8}), "code": Source("c", {0: 0.2, 9: 1.0})}
    text = dump(loaded.config)
    assert "mixture" in text
    rules.check(loaded.config, 1, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("data.mixture={web: {path: a}}", "data.mixture.web has no weight; give one"),
        ("data.mixture={web: {weight: 1}}", "data.mixture.web has no path; give one"),
        ("data.mixture={web: {path: a, weight: -1}}", "data.mixture.web.weight=-1 must be a number from 0 up"),
        ("data.mixture={web: {path: a, weight: 0}}", "gives no source a weight at step 0"),
        ("data.mixture={web: {path: a, weight: {5: 1}}}", "gives no source a weight at step 0"),
        ("data.mixture={web: {path: 3, weight: 1}}", "data.mixture.web.path=3 must be a path"),
        ("data.mixture={web: {paht: a, weight: 1}}", "data.mixture.web.paht: a source has a path and a weight"),
        ("data.mixture={'w b': {path: a, weight: 1}}", "data.mixture.w b.path: the name of a source has only letters"),
        ("data.mixture=a", "data.mixture=a must be"),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(ConfigError) as caught:
        _checked(given)
    assert words in str(caught.value)


def test_one_or_the_other():
    with pytest.raises(ConfigError, match=r"data\.path and data\.mixture both say what to train on"):
        _checked("data.path=x", "data.mixture={web: {path: a, weight: 1}}")


def _checked(*given: str) -> None:
    loaded = load([], ["train.steps=1", *given])
    rules.check(loaded.config, 1, None, loaded.origins)
