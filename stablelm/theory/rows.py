"""Softmax rows: how far Gaussian logits draw them from their mean, exactly, from tables; the least entropy of any."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stablelm.theory.hermite import POINTS, WEIGHTS

Array = NDArray[np.float64]

# Nodes of the tables: square roots of the logits' variance, and binary logarithms of the number of keys.
_ROOTS = np.linspace(0.05, 6.0, 36)
_LOG_KEYS = np.arange(1.0, 14.5, 0.5)
_ROWS_AT_ONCE = 1024


class RowFluctuations(NamedTuple):
    """Of softmax rows P over i.i.d. Gaussian logits; elementwise.

    `growth`: g for which E[sum P^2] = e^g / (e^g + keys - 1), at most the logits' variance; `slope_share`:
    E[sum_j P_j^2 |e_j - P|^2], the squared slope of the row, over S (1 - S) with S = E[sum P^2]; `entropy_loss`:
    ln keys - E[entropy], in nats.
    """

    growth: Array
    slope_share: Array
    entropy_loss: Array


def row_fluctuations(q: Array, keys: Array) -> RowFluctuations:
    """Fluctuations of rows whose logits have variance `q` about the row mean, over `keys` keys (may be fractions).

    Interpolated between exact values (derived here; see `_moments`) for 2 to 2^14 keys and q up to 36; outside,
    the nearest is taken.
    """
    x = (np.sqrt(np.clip(q, 0.0, _ROOTS[-1] ** 2)) - _ROOTS[0]) / (_ROOTS[1] - _ROOTS[0])
    y = (np.log2(np.maximum(keys, 1.0)) - _LOG_KEYS[0]) / (_LOG_KEYS[1] - _LOG_KEYS[0])
    x, y = np.clip(x, 0.0, _ROOTS.size - 1.001), np.clip(y, 0.0, _LOG_KEYS.size - 1.001)
    i, j = np.nan_to_num(x).astype(np.intp), np.nan_to_num(y).astype(np.intp)  # nan in, nan out
    x, y = (x - i)[..., None], (y - j)[..., None]
    table = _table()
    growth, share, loss = np.moveaxis(
        (1 - x) * ((1 - y) * table[i, j] + y * table[i, j + 1])
        + x * ((1 - y) * table[i + 1, j] + y * table[i + 1, j + 1]),
        -1,
        0,
    )
    return RowFluctuations(growth * q, share, loss * q / 2)


@lru_cache(maxsize=1)
def _table() -> Array:
    """(roots, keys, 3): growth / q, slope share and entropy loss / (q/2) at the nodes."""
    keys = 2.0**_LOG_KEYS
    rows = []
    for q in _ROOTS**2:
        second, slope = _moments(q, keys)
        growth = np.log(second * (keys - 1) / (1 - second))
        loss = np.log(keys) - expected_row_entropy(q, keys)
        rows.append(np.stack([growth / q, slope / (second * (1 - second)), loss / (q / 2)], axis=1))
    return np.stack(rows)


def _moments(q: float, keys: Array) -> tuple[Array, Array]:
    """E[sum P^2] and E[S2 - 2 S3 + S2^2], S_k = sum_j P_j^k, over that many keys of N(0, q) logits.

    With weights w = e^a, Z their sum and M_k(t) = E[(t w)^k e^(-t w)], 1/Z^k = int t^(k-1) e^(-t Z) dt / (k-1)!
    gives E[P_1^k] = int M_k M_0^(T-1) dt / (t (k-1)!), and E[P_1^2 P_2^2] likewise (derived here).
    """
    root, step = np.sqrt(q), 0.2
    t = np.exp(np.arange(-20 - np.log(keys.max()) - q / 2, 4 + 9 * root, step))
    scaled = t[:, None] * np.exp(root * POINTS)
    decay = np.exp(-scaled)
    m0, m2, m3, m4 = (decay * scaled**k @ WEIGHTS for k in (0, 2, 3, 4))
    n = keys[:, None]
    others = np.exp((n - 2) * np.log(np.maximum(m0, 1e-300)))
    second = (n * m2 * m0 * others).sum(axis=1) * step
    third = (n * m3 / 2 * m0 * others).sum(axis=1) * step
    square = ((n * m4 * m0 + n * (n - 1) * m2**2) / 6 * others).sum(axis=1) * step
    return second, second - 2 * third + square


def expected_row_entropy(q: float, keys: Array) -> Array:
    """E[entropy] in nats of a softmax over `keys` i.i.d. N(0, q) logits; `keys`: (n,) (derived here).

    With weights w = e^a, Z their sum and L(t) = E[e^(-t w)], Frullani's integral gives
    E[ln Z] = int (e^-t - L^T) dt/t and E[sum w a / Z] = T int E[w a e^(-t w)] L^(T-1) dt; the entropy is the
    difference. Exact up to quadrature; for many keys it tends to ln T - q/2.
    """
    logits = math.sqrt(q) * POINTS
    step = 0.2
    t = np.exp(np.arange(-34 - math.log(keys.max()) - q / 2, 4 + 9 * math.sqrt(q), step))
    decay = np.exp(-t[:, None] * np.exp(logits))
    log_laplace = np.log(np.maximum(decay @ WEIGHTS, 1e-300))
    pull = t * (decay @ (WEIGHTS * logits * np.exp(logits)))
    parts = []
    for start in range(0, keys.size, _ROWS_AT_ONCE):
        rows = keys[start : start + _ROWS_AT_ONCE, None]
        log_z = np.exp(-t) - np.exp(rows * log_laplace)
        mean_logit = rows * pull * np.exp((rows - 1) * log_laplace)
        parts.append((log_z - mean_logit).sum(axis=1) * step)
    return np.concatenate(parts)


def entropy_bound(spread: ArrayLike, keys: ArrayLike) -> Array:
    """Least entropy in nats of a softmax over `keys` logits a with ||a - mean(a)||_2 <= spread; elementwise.

    Zhai et al. 2023 (arXiv 2303.06296), Theorem 3.1, whose proof holds for any row with this norm in place of the
    spectral one. With beta = exp(-spread sqrt(T/(T-1))) and T keys it is
    ln(1 + (T-1) beta) + spread sqrt(T(T-1)) beta / (1 + (T-1) beta),
    attained by one logit above T - 1 equal ones. `keys` counts the unmasked keys only; one key gives 0.
    """
    spread, keys = np.asarray(spread, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    others = np.maximum(keys - 1, 1.0)
    beta = np.exp(-spread * np.sqrt(keys / others))
    bound = np.log1p(others * beta) + spread * np.sqrt(keys * others) * beta / (1 + others * beta)
    return np.where(keys > 1, bound, 0.0)[()]
