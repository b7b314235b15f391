"""Random softmax rows against Monte Carlo, and their limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stablelm.theory.rows import entropy_bound, expected_row_entropy, row_fluctuations

ROWS = 100_000


@pytest.mark.parametrize("keys", [2, 3, 11, 64])
@pytest.mark.parametrize("q", [0.1, 1.0, 3.2, 9.0])
def test_rows_equal_monte_carlo(q, keys):
    rng = np.random.default_rng(keys)
    weights = np.exp(np.sqrt(q) * rng.standard_normal((ROWS // keys, keys)))
    p = weights / weights.sum(axis=1, keepdims=True)
    second, third = (p**2).sum(axis=1), (p**3).sum(axis=1)
    rows = row_fluctuations(np.array([q]), np.array([float(keys)]))
    odds = np.exp(rows.growth[0])
    predicted = odds / (odds + keys - 1)
    assert predicted == pytest.approx(second.mean(), rel=0.03)
    slope = predicted * (1 - predicted) * rows.slope_share[0]
    assert slope == pytest.approx((second - 2 * third + second**2).mean(), rel=0.03)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1).mean()
    assert np.log(keys) - rows.entropy_loss[0] == pytest.approx(entropy, rel=0.02)


def test_equal_logits_leave_uniform_rows():
    rows = row_fluctuations(np.zeros(3), np.array([1.0, 2.0, 500.0]))
    assert (rows.growth == 0).all()
    assert (rows.entropy_loss == 0).all()
    assert rows.slope_share == pytest.approx(np.ones(3), abs=0.01)


def test_growth_tends_to_the_variance_for_many_keys_and_stays_below_it():
    q = np.full(4, 1.0)
    growth = row_fluctuations(q, np.array([4.0, 64.0, 1024.0, 16384.0])).growth
    assert (np.diff(growth) > 0).all()
    assert (growth < 1).all()
    assert growth[-1] > 0.99


def entropy(logits):
    """Of softmax(logits) along the last axis, in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    return np.log(total) - (weights * shifted).sum(axis=-1) / total


@pytest.mark.parametrize("q", [0.3, 1.0, 2.6, 8.0])
def test_expected_row_entropy_by_sampling(q):
    rng = np.random.default_rng(2)
    for keys in (1, 2, 4, 32, 256):
        rows = entropy(rng.normal(0, math.sqrt(q), (400_000 // max(keys, 4), keys)))
        error = 5 * rows.std() / math.sqrt(rows.size) + 1e-9
        assert expected_row_entropy(q, np.array([float(keys)]))[0] == pytest.approx(rows.mean(), abs=error)


def test_expected_row_entropy_of_long_rows():
    assert expected_row_entropy(1.0, np.array([1e5]))[0] == pytest.approx(math.log(100_000) - 0.5, abs=1e-3)


SPREADS = [0, 0.5, 1, 2, 5, 10]


@pytest.mark.parametrize(
    ("keys", "bounds"),
    [
        (16, [2.7726, 2.7621, 2.7168, 2.4187, 0.4903, 0.0056]),
        (64, [4.1589, 4.1562, 4.1437, 4.0411, 1.8026, 0.0292]),
        (512, [6.2383, 6.2380, 6.2364, 6.2222, 5.3617, 0.2475]),
    ],
)
def test_bound_at_known_values(keys, bounds):
    assert entropy_bound(SPREADS, keys) == pytest.approx(bounds, abs=1e-4)


@pytest.mark.parametrize("keys", [2, 16, 512])
def test_the_extremal_row_attains_the_bound(keys):
    for spread in SPREADS:
        row = np.full(keys, -spread / math.sqrt(keys * (keys - 1)))
        row[0] = spread * math.sqrt((keys - 1) / keys)
        assert np.linalg.norm(row) == pytest.approx(spread)
        assert entropy(row) == pytest.approx(entropy_bound(spread, keys), abs=1e-9)


def test_one_key_and_equal_logits():
    assert entropy_bound([0.0, 3.0, 100.0], 1).tolist() == [0, 0, 0]
    assert entropy_bound(0.0, [2, 64]) == pytest.approx(np.log([2, 64]), abs=1e-6)
    assert entropy_bound(1e4, 64) == 0


def test_ten_thousand_random_rows_lie_above():
    rng = np.random.default_rng(0)
    slack = []
    for keys in rng.integers(2, 65, 100):
        size = rng.choice([0.1, 1, 3, 10], (100, 1))
        rows = size * rng.standard_t(2, (100, keys))
        spread = np.linalg.norm(rows - rows.mean(axis=1, keepdims=True), axis=1)
        slack.append(entropy(rows) - entropy_bound(spread, keys))
    slack = np.concatenate(slack)
    assert slack.min() >= -1e-6
    assert np.median(slack) < 0.5, "the bound would be of no use"


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(-30, 30)))
def test_no_row_lies_below(row):
    assert entropy(row) >= entropy_bound(np.linalg.norm(row - row.mean()), row.size) - 1e-9


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 50), st.floats(0, 50), st.integers(2, 4096))
def test_larger_logits_allow_less_entropy(first, second, keys):
    low, high = sorted((first, second))
    assert entropy_bound(high, keys) <= entropy_bound(low, keys) + 1e-12


def test_masked_keys_do_not_count():
    row = np.array([0.4, -0.4, 0.1])
    masked = np.concatenate([row, np.full(5, -np.inf)])
    with np.errstate(invalid="ignore"):
        weights = np.exp(masked) / np.exp(masked).sum()
    kept = -(weights[:3] * np.log(weights[:3])).sum()
    assert entropy_bound(np.linalg.norm(row - row.mean()), 3) <= kept <= math.log(3)
    assert kept < entropy_bound(np.linalg.norm(row - row.mean()), 8), "counting masked keys would give a false bound"
