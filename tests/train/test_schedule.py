"""The learning rate of every step, against the formulas worked out by hand."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelm.config.schema import TrainConfig
from stablelm.train.schedule import learning_rate

BASE = TrainConfig(steps=100, lr=1.0, min_lr=0.1, warmup_steps=10, cooldown_steps=20, power_after=10)


def rate(step: int, **changes) -> float:
    return learning_rate(step, dataclasses.replace(BASE, **changes))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_never_zero(schedule: str):
    assert [rate(s, schedule=schedule) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(100, schedule=schedule, warmup_steps=1000) == pytest.approx(0.1)


def test_shapes_after_the_warm_up():
    assert rate(55, schedule="cosine") == pytest.approx(0.55)
    assert rate(32, schedule="cosine") == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))
    assert rate(55, schedule="linear") == pytest.approx(0.55)
    assert [rate(s, schedule="wsd") for s in (11, 80, 90)] == pytest.approx([1.0, 1.0, 0.55])
    assert rate(100, schedule="constant") == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "power"])
def test_last_step_reaches_min_lr(schedule: str):
    assert rate(100, schedule=schedule) == pytest.approx(0.1)


def test_a_cooldown_of_one_minus_the_root():
    for schedule in ("wsd", "power"):
        found = [rate(s, schedule=schedule, cooldown_shape="1-sqrt", power_after=200) for s in (80, 85, 100)]
        assert found == pytest.approx([1.0, 0.1 + 0.9 * (1 - math.sqrt(0.25)), 0.1])


def test_power_is_constant_then_a_power_then_a_cooldown():
    options = {"schedule": "power", "power_after": 20, "power_exponent": 0.5}
    assert [rate(s, **options) for s in (10, 20, 80)] == pytest.approx([1.0, 1.0, 0.5])
    assert [rate(s, **options) for s in (90, 100)] == pytest.approx([0.3, 0.1])
    assert rate(80, schedule="power", power_after=1, power_exponent=2.0) == 0.1  # never below min_lr


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(0, 300),
    st.sampled_from(["cosine", "linear", "wsd", "power", "constant"]),
)
def test_always_positive_and_at_most_lr(step: int, steps: int, warmup: int, schedule: str):
    value = rate(min(step, steps), steps=steps, warmup_steps=warmup, schedule=schedule, cooldown_steps=min(20, steps))
    assert 0 < value <= 1.0
