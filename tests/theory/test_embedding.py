"""Token embedding variability: value at initialisation and what it ignores."""

import math

import numpy as np
import pytest

from stablelm.theory.embedding import tev, tev_at_initialisation


@pytest.mark.parametrize("d_model", [256, 768])
def test_value_at_initialisation(d_model):
    rows = np.random.default_rng(0).normal(0, 0.02, (5000, d_model))
    mean, std = tev_at_initialisation(0.02, d_model)
    assert mean / 0.02 == pytest.approx(1 - 3 / (4 * d_model))
    assert std * math.sqrt(2 * d_model) / 0.02 == pytest.approx(1)
    measured_mean, measured_std = tev(rows)
    assert measured_mean == pytest.approx(mean, rel=0.003)
    assert measured_std == pytest.approx(std, rel=0.05)


def test_shift_of_a_row_is_ignored_and_scale_is_kept():
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 0.02, (200, 64)).astype(np.float32)
    assert tev(rows + rng.normal(0, 1, (200, 1))) == pytest.approx(tev(rows), rel=1e-9)
    assert tev(-7.0 * rows.astype(np.float64)) == pytest.approx(tuple(7 * x for x in tev(rows)), rel=1e-9)


def test_population_standard_deviation_of_known_rows():
    assert tev([[1.0, -1.0], [5.0, 11.0]]) == (2.0, 1.0)
