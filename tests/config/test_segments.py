"""Keys that may change at a checkpoint: which, what a run remembers of it, and what each step's settings were."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_identity import make

from stablelm.config import rules
from stablelm.config.identity import changes, differences
from stablelm.config.keys import keys
from stablelm.config.load import load
from stablelm.config.segments import (
    CHANGEABLE,
    SEGMENTS,
    Segment,
    allowed,
    refused,
    segments_of,
    undone,
    with_segments,
)
from stablelm.errors import ConfigError
from stablelm.train.schedule import TrainHistory


def problems(*names: str) -> list[str]:
    loaded = load([], ["train.steps=1", f"run.allow=[{','.join(names)}]"])
    try:
        rules.check(loaded.config, 1, None, loaded.origins)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_every_key_may_change_or_is_refused_with_a_reason():
    assert set(CHANGEABLE) <= {name for name, key in keys().items() if key.identity}
    assert problems(*CHANGEABLE) == []
    for name, key in keys().items():
        if name not in CHANGEABLE and name != "train.tokens":
            (line,) = problems(name)
            reason = "cannot change within a run, since" if key.identity else "may change at any time"
            assert line.startswith(f"run.allow: {name} {reason}"), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.lrr", "unknown key train.lrr, did you mean train.lr?"),
        ("weather", "unknown key weather; see docs/changing_a_run.md"),
        ("train", "unknown key train"),
        ("train.tokens", "train.tokens counts by the steps that it makes; allow train.steps"),
        ("model.d_model", "model.d_model cannot change within a run, since the weights belong to it; start a new run"),
        ("train.micro_batch_size", "train.micro_batch_size may change at any time; remove it from the list"),
    ],
)
def test_a_name_that_cannot_be_allowed(name: str, words: str):
    (line,) = problems(name)
    assert line.startswith(f"run.allow: {words}")
    assert line.endswith(f"(argument run.allow=[{name}])")


def test_what_is_derived_from_an_allowed_key_follows_it():
    def of(*arguments: str) -> set[str]:
        return set(allowed(load([], list(arguments)).config))

    assert of() == set()
    assert of("run.allow=[train.lr]") == {"train.lr", "train.min_lr"}
    assert of("run.allow=[train.lr]", "train.min_lr=0") == {"train.lr"}
    assert of("run.allow=[train.schedule]") == {"train.schedule", "train.cooldown_steps"}


def test_allowed_keys_may_differ_and_no_others():
    saved, current = make(), make("train.lr=1e-3", "train.eps=1e-6")
    assert set(changes(saved, current)) == {"train.lr", "train.min_lr", "train.eps"}
    (line,) = differences(saved, current, allowed=("train.lr", "train.min_lr"))
    assert line.startswith("train.eps")
    longer = make("train.schedule=constant", "train.steps=200", "train.lr=1e-3")
    assert differences(make("train.schedule=constant"), longer, step=50, allowed=("train.lr", "train.min_lr")) == []


def test_segments_are_told_and_not_compared():
    plain = make()
    assert with_segments(plain, []) == plain, "a run that never changed has today's identity"
    assert differences(plain, with_segments(plain, [{"step": 1, "keys": {"train.lr": [1.0, 2.0]}}])) == []


RATES = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1e-3, 2e-3, 5e-3])), max_size=5)


@settings(max_examples=40, deadline=None)
@given(RATES)
def test_the_settings_of_a_step_are_those_of_its_time(drawn: list[tuple[int, float]]):
    """Against a list that is written step by step."""
    drawn = sorted(drawn, key=lambda change: change[0])
    rate, segments, expected = 3e-4, [], [3e-4] * 12
    history = [dict(make())]
    for step, new in drawn:
        segment: Segment = {"step": step, "keys": {"train.lr": [rate, new], "train.grad_clip": [1.0, 1.0]}}
        segments.append(segment)
        rate = new
        expected[step:] = [new] * (12 - step)
        history.append(with_segments(make() | {"train.lr": rate}, segments))
    train = load([], ["train.steps=12", f"train.lr={rate}"]).config.train
    found = TrainHistory(train, segments)
    assert [found.at(step).lr for step in range(1, 13)] == expected
    for kept in range(len(segments) + 1):
        assert undone(history[-1], kept) == history[kept]


def test_values_of_a_foreign_identity_are_checked():
    segment: Segment = {"step": 3, "keys": {"train.lr": ["high", 1e-3]}}
    with pytest.raises(ConfigError, match=r"train\.lr=high must be a number \(the identity's change at step 3\)"):
        TrainHistory(load([], ["train.steps=9"]).config.train, [segment])
    unknown: Segment = {"step": 3, "keys": {"model.method": ["gpt2", "pre_ln"]}}
    train = load([], ["train.steps=9"]).config.train
    assert TrainHistory(train, [unknown]).at(1) == train


@pytest.mark.parametrize(
    ("before", "after", "data_step", "fix"),
    [
        (16, 32, 0, ""),
        (16, {"0": 16, "20": 32}, 20, ""),
        (16, {"0": 16, "19": 32}, 20, "{0: 16, 20: 32}"),
        (16, 32, 20, "{0: 16, 20: 32}"),
        ({"0": 8, "10": 16}, {"0": 8, "10": 16, "20": 64}, 15, ""),
        ({"0": 8, "10": 16}, {"0": 8, "11": 16}, 11, "{0: 8, 10: 16, 11: 16}"),
        ({"0": 8, "30": 16}, 8, 20, ""),
    ],
)
def test_a_ramp_keeps_the_batches_that_are_trained(before: Any, after: Any, data_step: int, fix: str):
    found = refused({"train.global_batch_size": [before, after]}, 5, data_step)
    assert len(found) == bool(fix)
    assert not fix or found[0].endswith(f"later ones, as {fix}")


def test_steps_do_not_fall_below_what_is_finished():
    assert refused({"train.steps": [100, 50]}, 50, 50) == []
    (line,) = refused({"train.steps": [100, 49]}, 50, 50)
    assert line == "train.steps=49 is below the 50 steps that are finished; raise it"


def test_an_identity_without_changes_has_none():
    assert segments_of(make()) == []
    assert SEGMENTS not in make()
