"""The search for a learning rate, on losses that are functions of it."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelm.study.search import Best, Edge, Next, replay, search
from stablelm.study.study_file import LearningRates


def followed(rates: LearningRates, loss: Callable[[float], float]) -> tuple[Best | Edge, list[float]]:
    """The end of the search and the rates on its path."""
    known, found = replay(rates, loss)
    assert not isinstance(found, Next)
    return found, list(known)


def bowl(best: float, curvature: float = 0.1) -> Callable[[float], float]:
    return lambda rate: 3 + curvature * math.log(rate / best) ** 2


@given(st.floats(1.2e-4, 0.05))
def test_the_best_rate_is_found_within_the_factor(best: float):
    found, tried = followed(LearningRates(), bowl(best))
    assert isinstance(found, Best) and len(tried) <= 7
    assert max(found.rate / best, best / found.rate) <= 2.0
    below = max(rate for rate in tried if rate < found.rate)
    above = min(rate for rate in tried if rate > found.rate)
    assert bowl(best)(below) >= bowl(best)(found.rate) <= bowl(best)(above)
    assert found.rate / below <= 2.01 and above / found.rate <= 2.01


@given(st.floats(1e-6, 1.0), st.randoms(use_true_random=False))
def test_runs_in_any_order_and_lost_ones_take_the_same_path(best: float, draw):
    rates, made = LearningRates(), dict[float, float]()
    losses = iter(range(10))  # how often a result is lost
    while isinstance(found := replay(rates, made.get)[1], Next):
        rate = draw.choice([rate for rate in found.rates if rate not in made])
        made[rate] = bowl(best)(rate)
        if draw.random() < 0.3 and next(losses, None) is not None:
            del made[draw.choice(list(made))]
    assert replay(rates, made.get) == replay(rates, bowl(best))


@pytest.mark.parametrize(("best", "side"), [(1e-6, "above lr.bounds[0]"), (30.0, "below lr.bounds[1]")])
def test_a_best_rate_at_the_bounds_is_an_edge(best: float, side: str):
    found, tried = followed(LearningRates(max_runs=20), bowl(best))
    assert isinstance(found, Edge) and side in found.why
    assert found.rate in (min(tried), max(tried))
    assert all(1e-5 <= rate <= 0.3 for rate in tried)


def test_too_few_runs_are_an_edge():
    found, tried = followed(LearningRates(max_runs=4), bowl(1e-4))
    assert found == Edge(0.00025, "lr.max_runs=4 rates were tried") and len(tried) == 4


def test_a_diverged_rate_is_worse_than_any():
    def loss(rate: float) -> float:
        return math.inf if rate > 2e-3 else bowl(1e-2)(rate)

    found, _ = followed(LearningRates(), loss)
    assert isinstance(found, Best) and 0.7e-3 < found.rate <= 2e-3


def test_when_all_diverge_smaller_rates_are_tried():
    found, tried = followed(LearningRates(max_runs=9), lambda rate: math.inf if rate > 1e-4 else bowl(1e-4)(rate))
    assert isinstance(found, Best) and found.rate <= 1e-4
    nothing, tried = followed(LearningRates(max_runs=20), lambda rate: math.inf)
    assert nothing == Edge(None, "every rate diverged above lr.bounds[0]=1e-05") and min(tried) >= 1e-5


def test_of_equal_losses_the_smaller_rate_is_the_best():
    found, _ = followed(
        LearningRates(start=[1e-3, 2e-3, 4e-3, 8e-3]), lambda rate: 3.0 if 1.9e-3 < rate < 4.1e-3 else 3.1
    )
    assert found == Best(2e-3)


def test_fixed_rates_are_all_there_is():
    rates = LearningRates(fixed=[3e-4, 1e-3])
    assert followed(rates, bowl(1e-2)) == (Best(1e-3), [3e-4, 1e-3])
    assert followed(rates, lambda rate: math.inf)[0] == Edge(None, "every rate of lr.fixed diverged")


def test_one_start_is_widened_to_both_sides():
    assert search(LearningRates(start=[1e-3]), {1e-3: 3.0}) == Next((2.5e-4, 4e-3))
