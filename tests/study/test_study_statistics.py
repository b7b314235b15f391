"""Intervals, tests and fits, against tables and closed forms."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelm.study.statistics import (
    around,
    holm,
    interval,
    line,
    paired,
    pooled,
    share_best,
    smallest_difference,
    t_cumulative,
    t_quantile,
    vertex,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (29, 2.04523), (120, 1.97993)],
)
def test_quantiles_of_t(freedom: int, quantile: float):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)
    assert t_quantile(0.025, freedom) == pytest.approx(-quantile, rel=1e-5)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_the_distribution_of_t_is_one(t: float, freedom: int):
    assert 0 <= t_cumulative(t, freedom) <= 1
    assert t_cumulative(t, freedom) + t_cumulative(-t, freedom) == pytest.approx(1, abs=1e-12)


def test_pooled_deviation_and_interval():
    spread = pooled([[1.0, 2.0, 3.0], [5.0, 7.0], [9.0]])
    assert spread is not None and spread == (pytest.approx(math.sqrt((2 + 2) / 3)), 3)
    found = interval([1.0, 2.0, 3.0], spread)
    assert found.mean == 2.0 and found.half == pytest.approx(3.18245 * spread[0] / math.sqrt(3), rel=1e-5)
    assert pooled([[1.0], [2.0]]) is None and interval([1.0], None).half is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw, covered = random.Random(0), 0
    for _ in range(1000):
        cells = [[draw.gauss(0.0, 1.0) for _ in range(3)] for _ in range(4)]
        found = interval(cells[0], pooled(cells))
        covered += found.low <= 0.0 <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_smallest_difference_is_seen_with_power_80():
    draw, seen, difference = random.Random(0), 0, smallest_difference(1.0, 20)
    for _ in range(1000):
        a, b = ([draw.gauss(mean, 1.0) for _ in range(20)] for mean in (0.0, difference))
        error = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 20)
        seen += abs(statistics.fmean(b) - statistics.fmean(a)) / error > t_quantile(0.975, 38)
    assert 0.75 <= seen / 1000 <= 0.84


@given(st.floats(1e-4, 1e-1), st.floats(0.01, 1.0))
def test_the_lowest_point_of_a_parabola(best: float, curvature: float):
    losses = {best * factor: 3 + curvature * math.log(factor) ** 2 for factor in (0.3, 0.6, 1.3, 2.5)}
    found = vertex(losses, None)
    assert found is not None
    assert found.rate == pytest.approx(best, rel=1e-6) and found.loss == pytest.approx(3, abs=1e-6)


def test_no_lowest_point_outside_or_of_a_hill():
    assert vertex({1e-3: 3.0, 2e-3: 2.9, 4e-3: 2.85}, None) is None
    assert vertex({1e-3: 3.0, 2e-3: 3.1, 4e-3: 3.0}, None) is None
    assert vertex({1e-3: 3.0, 2e-3: 2.9}, None) is None
    assert around({1e-3: math.inf}) == []


def test_the_interval_of_the_lowest_point_grows_with_the_noise():
    losses = {rate: 3 + 0.1 * math.log(rate / 3e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    narrow, wide = vertex(losses, 1e-4), vertex(losses, 1e-2)
    assert narrow is not None and wide is not None
    assert wide.low < narrow.low < 3e-3 < narrow.high < wide.high


def test_a_line_and_its_interval():
    assert line([(1.0, 1.0)]) is None
    assert line([(0.0, 1.0), (1.0, 3.0)]) == (2.0, 1.0, None)
    found = line([(0.0, 1.1), (1.0, 2.9), (2.0, 5.1), (3.0, 6.9)])
    assert found is not None and found.half is not None
    assert found.slope == pytest.approx(1.96) and found.half == pytest.approx(4.30265 * math.sqrt(0.016 / 5), rel=1e-5)


def test_paired_differences():
    found = paired({1: 3.0, 2: 3.2, 3: 3.1, 9: 0.0}, {1: 2.9, 2: 3.0, 3: 2.95, 8: 0.0})
    assert found is not None and found.p is not None
    assert found.mean == pytest.approx(0.15) and found.half == pytest.approx(4.30265 * 0.05 / math.sqrt(3), rel=1e-4)
    assert found.p == pytest.approx(0.0351, abs=2e-4)
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: 1.0}, {1: 0.5}) == (0.5, None, None)
    assert paired({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}) == (0.0, 0.0, 1.0)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_shares_of_being_best():
    found = share_best({"a": lambda draw: draw.gauss(0, 1), "b": lambda draw: draw.gauss(0, 1), "c": lambda draw: 9.0})
    assert found["c"] == 0 and abs(found["a"] - 0.5) < 0.05 and sum(found.values()) == pytest.approx(1)
    assert share_best({"a": lambda draw: 1.0, "b": lambda draw: 1.0})["a"] == pytest.approx(0.5)
