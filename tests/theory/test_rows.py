"""Random softmax rows against Monte Carlo, and their limits."""

import math

import numpy as np
import pytest

from stablelm.theory.rows import expected_row_entropy, row_fluctuations

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
