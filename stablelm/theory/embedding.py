"""Token embedding variability (TEV), a cheap sign of unstable pretraining (arXiv 2409.07787)."""

import math

import numpy as np
from numpy.typing import ArrayLike


def tev(rows: ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation over the vocabulary of each row's standard deviation, both population.

    `rows`: (vocab, d_model), without padding rows. TEV(e_i) = sqrt(mean_j (e_ij - mean_j e_ij)^2), arXiv 2409.07787.
    """
    spread = np.asarray(rows, dtype=np.float64).std(axis=1)
    return float(spread.mean()), float(spread.std())


def tev_at_initialisation(std: float, d_model: int) -> tuple[float, float]:
    """TEV's mean and standard deviation for rows i.i.d. N(0, std^2), to first order in 1/d_model (derived here)."""
    return std * (1 - 3 / (4 * d_model)), std / math.sqrt(2 * d_model)
