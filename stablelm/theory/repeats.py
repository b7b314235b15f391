"""Positions of a sequence that hold the same token, in attention (derived here; checked against simulation).

A kernel has the mean over pairs of positions. Pairs with the same token are a small share of them, but start with
correlation 1: their keys get the same logits, so that attention draws them together as it does a key with itself, by
e^q with q the variance of the logits. To a branch of nearly uncorrelated tokens they add as much as single keys do.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Repeats(NamedTuple):
    """Pairs of positions with the same token: their share of all pairs, and the mean correlation of the two positions
    in what attention reads, and in the first attention body's values where these are mixed in."""

    share: float
    correlation: float
    first: float


def pair(variance: float, correlation: float) -> Array:
    """The kernel of two positions with the same token, (2, 2)."""
    return variance * np.array([[1.0, correlation], [correlation, 1.0]])


def correlation_of(kernel: Array) -> float:
    """Of the two positions of a `pair`."""
    return float(kernel[0, 1] / kernel[0, 0]) if kernel[0, 0] > 0 else 0.0


def token_correlation(kernel: Array) -> float:
    """Mean over pairs of positions of K_ab / sqrt(K_aa K_bb); `kernel`: (T, T) with T > 1."""
    std = np.sqrt(np.diagonal(kernel))
    size = len(kernel)
    return float(((kernel / np.outer(std, std)).sum() - size) / (size * (size - 1)))


def roots(kernel: Array) -> Array:
    """sqrt(K_aa K_bb), (T, T)."""
    std = np.sqrt(np.maximum(np.diagonal(kernel), 0.0))
    return np.outer(std, std)
