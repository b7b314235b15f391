"""Entropy of attention rows: lower bounds from the size of the logits, and expected values at initialisation."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_ROWS_AT_ONCE = 1024


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


def spectral_entropy_bound(sigma: ArrayLike, keys: ArrayLike, d_head: int | None = None) -> Array:
    """Theorem 3.1 of Zhai et al. 2023 as stated: sigma = ||W_K W_Q^T||_2 ||X X^T||_2, for every row.

    `d_head`: logits are divided by sqrt(d_head); None for unscaled logits.
    """
    scale = 1.0 if d_head is None else math.sqrt(d_head)
    return entropy_bound(np.asarray(sigma, dtype=np.float64) / scale, keys)


def expected_uniform_entropy(seq_len: int) -> float:
    """Mean of ln i over the causal rows i = 1 .. seq_len, ln(seq_len!) / seq_len: entropy of uniform attention."""
    return math.lgamma(seq_len + 1) / seq_len


def expected_row_entropy(q: float, keys: ArrayLike) -> Array:
    """E[entropy] in nats of a softmax over `keys` i.i.d. N(0, q) logits; 1-D array of key counts (derived here).

    With weights w = e^a, Z their sum and L(t) = E[e^(-t w)], Frullani's integral gives
    E[ln Z] = int (e^-t - L^T) dt/t and E[sum w a / Z] = T int E[w a e^(-t w)] L^(T-1) dt; the entropy is the
    difference. Exact up to quadrature; for many keys it tends to ln T - q/2.
    """
    keys = np.atleast_1d(np.asarray(keys, dtype=np.float64))
    z = np.linspace(-12.0, 12.0, 481)
    weights = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    logits = math.sqrt(q) * z
    step = 0.2
    t = np.exp(np.arange(-34 - math.log(keys.max()) - q / 2, 4 + 9 * math.sqrt(q), step))
    decay = np.exp(-t[:, None] * np.exp(logits))
    log_laplace = np.log(np.maximum(decay @ weights, 1e-300))
    pull = t * (decay @ (weights * logits * np.exp(logits)))
    parts = []
    for start in range(0, keys.size, _ROWS_AT_ONCE):
        rows = keys[start : start + _ROWS_AT_ONCE, None]
        log_z = np.exp(-t) - np.exp(rows * log_laplace)
        mean_logit = rows * pull * np.exp((rows - 1) * log_laplace)
        parts.append((log_z - mean_logit).sum(axis=1) * step)
    return np.concatenate(parts)


@lru_cache(maxsize=4096)
def _mean_entropy(q: float, seq_len: int) -> float:
    return float(expected_row_entropy(q, np.arange(1, seq_len + 1)).mean())


def expected_entropy(q: ArrayLike, seq_len: int) -> Array:
    """Mean over the causal rows 1 .. seq_len of `expected_row_entropy`, in nats; elementwise over `q`, cached.

    `q` is the variance of the logits about their row mean, which is all a softmax sees.
    """
    q = np.asarray(q, dtype=np.float64)
    return np.asarray([_mean_entropy(float(value), seq_len) for value in q.flat]).reshape(q.shape)[()]
