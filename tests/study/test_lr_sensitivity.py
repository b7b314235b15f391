"""Learning-rate sensitivity against values worked out by hand."""

import math

import pytest

from stablelm.study.sensitivity import lr_sensitivity

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def at(*losses: float) -> dict[float, float]:
    return dict(zip(RATES, losses, strict=False))


@pytest.mark.parametrize("failed", [math.nan, math.inf, -math.inf, 10.4, 1e9])
def test_a_failed_run_counts_as_the_initial_loss(failed: float):
    # (0.2 + 0.05 + 0 + 0.02 + 0.3 + 4.5 + 7.4) / 7
    losses = at(3.2, 3.05, 3.0, 3.02, 3.3, 7.5, failed)
    assert lr_sensitivity(losses, 10.4) == pytest.approx(1.781429, abs=1e-6)


def test_losses_above_the_initial_one_are_capped():
    assert lr_sensitivity(at(3.0, 20.0), 5.0) == pytest.approx(1.0)
    assert lr_sensitivity(at(3.0, 4.0), 5.0) == pytest.approx(0.5)


@pytest.mark.parametrize("losses", [(3.0, 3.0, 3.0), (2.5,), (7.0, 8.0)])
def test_nothing_to_choose_is_zero(losses: tuple[float, ...]):
    assert lr_sensitivity(at(*losses), 6.0) == 0


def test_order_and_values_of_the_learning_rates_do_not_matter():
    assert lr_sensitivity({1.0: 3.0, 2.0: 4.0}, 9.0) == lr_sensitivity({0.1: 4.0, 5.0: 3.0}, 9.0)


@pytest.mark.parametrize(
    ("losses", "initial", "words"),
    [
        ({}, 10.4, "at least one"),
        ({1e-3: math.nan, 1e-2: math.inf}, 10.4, "no learning rate has a finite loss"),
        ({1e-3: 3.0}, math.nan, "must be finite"),
    ],
)
def test_nothing_to_be_said_is_an_error(losses: dict[float, float], initial: float, words: str):
    with pytest.raises(ValueError, match=words):
        lr_sensitivity(losses, initial)
