"""Batch sizes by step: arithmetic against counting, and what a ramp may look like."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm.config import rules
from stablelm.config.batch_sizes import BatchSizes
from stablelm.config.load import dump, load, loads
from stablelm.config.trust import excesses
from stablelm.errors import ConfigError
from stablelm.plan.request import prepare

BASE = ("train.steps=100", "data.lanes=24")
RAMP = "train.global_batch_size={0: 32, 1000: 64}"


def of(*arguments: str):
    return load([], [*BASE, *arguments]).config


def problems(*arguments: str, world_size: int = 1) -> list[str]:
    loaded = load([], [*BASE, *arguments])
    try:
        rules.check(loaded.config, world_size, None, loaded.origins)
    except ConfigError as error:
        return str(error).splitlines()
    return []


ramps = st.dictionaries(st.integers(1, 30), st.integers(1, 20), max_size=4).flatmap(
    lambda later: st.integers(1, 20).map(lambda first: {0: first, **later})
)


@settings(max_examples=40, deadline=None)
@given(ramps)
def test_arithmetic_is_that_of_counting(ramp: dict[int, int]):
    sizes = BatchSizes.of(ramp)
    assert BatchSizes.saved(json.loads(json.dumps(sizes.plain()))) == sizes
    sample = 0
    for step in range(40):
        size = ramp[max(first for first in ramp if first <= step)]
        assert (sizes.at(step), sizes.before(step)) == (size, sample)
        for _ in range(size):
            assert sizes.step_of(sample) == step
            sample += 1
            assert sizes.steps_for(sample) == step + 1
    assert (sizes.first, sizes.largest) == (ramp[0], max(ramp.values()))


def test_a_ramp_is_read_written_and_overridden():
    config = of(RAMP)
    assert config.train.global_batch_size == {0: 32, 1000: 64}
    assert loads(dump(config), "dump") == config
    assert of(RAMP, "train.global_batch_size.2000=128").train.global_batch_size == {0: 32, 1000: 64, 2000: 128}
    assert of(RAMP, "train.global_batch_size=16").train.global_batch_size == 16
    assert loads("train: {global_batch_size: {0: 8, 10: 16}}", "file").train.global_batch_size == {0: 8, 10: 16}


@pytest.mark.parametrize("same", ["{0: 32}", "{0: 32, 50: 32}"])
def test_a_ramp_that_does_not_change_is_one_size(same: str):
    assert of(f"train.global_batch_size={same}").train.batch_sizes.plain() == 32


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("{1: 32}", "={1: 32} lacks the size of step 0; begin with it, as {0: 32, 1000: 64} (argument train."),
        ("{}", "={} lacks the size of step 0; begin with it, as {0: 32, 1000: 64} (argument train."),
        ("{0: 32, 9: 0}", ".9=0 must be at least 1 (argument train.global_batch_size={0: 32, 9: 0})"),
    ],
)
def test_ramps_that_are_refused_by_rule(argument: str, words: str):
    (found,) = problems(f"train.global_batch_size={argument}")
    assert found.startswith(f"train.global_batch_size{words}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("{0: 32, soon: 64}", "train.global_batch_size.soon: soon must be a step, an integer from 0 up"),
        ("{0: 32, -1: 64}", "train.global_batch_size.-1: -1 must be a step, an integer from 0 up"),
        ("{0: 32, 007: 64}", "train.global_batch_size.007: 007 must be a step, an integer from 0 up"),
        ("{0: 32, 9: many}", "train.global_batch_size.9=many must be an integer"),
        ("{0: {1: 2}}", "train.global_batch_size.0.1: 0.1 must be a step, an integer from 0 up"),
        ("many", "train.global_batch_size=many must be an integer or a mapping of steps to integers"),
        ("null", "train.global_batch_size=null must be an integer or a mapping of steps to integers"),
    ],
)
def test_ramps_that_cannot_be_read(argument: str, words: str):
    with pytest.raises(ConfigError) as caught:
        of(f"train.global_batch_size={argument}")
    assert str(caught.value).startswith(words)


def test_each_stage_must_be_divisible_and_is_named():
    ramp = "train.global_batch_size={0: 12, 10: 18, 20: 24}"
    assert problems(ramp, world_size=3) == []
    (found,) = problems(ramp, world_size=4)
    assert found == (
        "train.global_batch_size.10=18 must be divisible by the number of processes, 4; use 16 or 20, "
        f"or start 3 or 6 processes (argument {ramp})"
    )
    (found,) = problems(ramp, "train.micro_batch_size=4", world_size=1)
    assert found == (
        "train.micro_batch_size=4 on 1 process does not divide train.global_batch_size.10=18; use 3 or 6, "
        f"or 16 or 20 sequences (argument train.micro_batch_size=4, argument {ramp})"
    )
    assert problems(ramp, "train.micro_batch_size=3", world_size=2) == []


@settings(max_examples=40, deadline=None)
@given(ramps, st.sampled_from([1, 2, 3, 4, 6]), st.none() | st.integers(1, 9))
def test_a_ramp_passes_just_if_every_stage_can_be_shared_out(ramp: dict[int, int], world_size: int, micro: int | None):
    lines = problems(
        f"train.global_batch_size={ramp}", f"train.micro_batch_size={micro or 'null'}", world_size=world_size
    )
    part = world_size * (micro or 1)
    assert len(lines) == sum(size % part > 0 for size in ramp.values())
    for line in lines:
        assert "must be divisible by" in line or "does not divide" in line


def test_the_largest_size_of_a_checkpoint_is_what_is_believed_of_it():
    assert excesses(of(RAMP)) == []
    (line,) = excesses(of("train.global_batch_size={0: 32, 9: 2000000}"))
    assert "is above 1048576, the most that is believed of a checkpoint" in line


def test_a_damaged_ramp_of_an_identity_is_told():
    with pytest.raises(ConfigError, match=r"in the run's identity train\.global_batch_size=\{5: 2\} lacks"):
        BatchSizes.saved({"5": 2})


def test_a_plan_is_that_of_the_largest_step():
    ramp = ("train.global_batch_size={0: 4, 10: 8}", "data.seq_len=16", "data.lanes=8", "model.vocab_size=320")
    loaded = load([], [*ramp, f"train.tokens={640 + 129}"])
    config = prepare(loaded, 4, "h100-80", 8).config
    assert (config.train.global_batch_size, config.train.steps) == (8, 12)


def test_tokens_become_the_steps_that_see_them():
    ramp, length = "train.global_batch_size={0: 4, 10: 8}", "data.seq_len=16"
    for tokens, steps in ((1, 1), (640, 10), (641, 11), (640 + 128, 11), (640 + 129, 12)):
        config = load([], [ramp, length, "data.lanes=8", f"train.tokens={tokens}"]).config
        found = rules.resolve(config, pieces=300, world_size=4, accelerate_precision=None)
        assert found.train.steps == steps
        assert found.train.micro_batch_size == 2, "no accumulation in the largest stage"
