"""E-SPA: attention that needs no skip, and the activation that goes with it (He et al., ICLR 2023).

The attention of layer l is the matrix A_l = L_l L_{l-1}^-1 of Cholesky factors of exp(-gamma_l |i - j|), so that
the tokens' kernel after layer l is exactly that; softmax attention makes it with zero queries, a bias
B_l = log(A_l / rowsum) and a row scale D_l = rowsum(A_l). The closed form (an AR(1) process) is derived here.
"""

import math
from functools import lru_cache

import numpy as np

FINAL_DECAY = 0.005
FINAL_CORRELATION = 0.9


def decay(layer: int, n_layers: int) -> float:
    """gamma after `layer` layers (from 1): -ln(1 - a^(2 layer / n_layers)) / 2 with a^2 = 1 - exp(-2 FINAL_DECAY).

    Geometric in the innovation a_l = sqrt(1 - exp(-2 gamma_l)), so that all layers have the same diagonal.
    """
    return -0.5 * math.log1p(-(_innovation(layer, n_layers) ** 2))


def _innovation(layer: int, n_layers: int) -> float:
    return math.sqrt(-math.expm1(-2 * FINAL_DECAY)) ** (layer / n_layers)


@lru_cache(maxsize=8)
def _distances(seq_len: int) -> np.ndarray:
    return np.subtract.outer(np.arange(seq_len, dtype=np.float64), np.arange(seq_len, dtype=np.float64))


def log_attention(layer: int, n_layers: int, seq_len: int) -> np.ndarray:
    """log A_l of layer `layer` (from 0) in float64, (seq_len, seq_len), -inf above the diagonal.

    With phi = exp(-gamma), a = sqrt(1 - phi^2) and primes for the layer before: A_11 = 1, A_ii = a / a',
    A_ij = (a / a') (phi - phi') phi^(i-j-1), A_i1 = phi^(i-2) (phi - a phi' / a'). Logs, because entries span
    hundreds of orders of magnitude.
    """
    a, before = _innovation(layer + 1, n_layers), _innovation(layer, n_layers)
    phi, phi_before = math.sqrt(1 - a * a), math.sqrt(max(0.0, 1 - before * before))
    log_phi, log_ratio = math.log(phi), math.log(a / before)
    distance = _distances(seq_len)
    logs = log_ratio + math.log(phi - phi_before) + (distance - 1) * log_phi
    logs[:, 0] = distance[:, 0] * log_phi - log_phi + math.log(phi - a / before * phi_before)
    logs[np.diag_indices(seq_len)] = log_ratio
    logs[0, 0] = 0.0
    logs[distance < 0] = -np.inf
    return logs


def bias_and_scale(layer: int, n_layers: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, D): the bias on the logits, (seq_len, seq_len), and what multiplies each row's output, (seq_len,)."""
    logs = log_attention(layer, n_layers, seq_len)
    rows = np.exp(logs).sum(axis=1)
    return logs - np.log(rows)[:, None], rows


@lru_cache(maxsize=64)
def tailored_slope(n_layers: int) -> float:
    """Negative slope of the leaky relu that takes correlation 0 to FINAL_CORRELATION over n_layers activations.

    Tailored activation transformation (Zhang et al., ICLR 2022) as used by He et al.: bisection on the slope of
    `composed_correlation`; 0 (a relu) where depth is too small to get there.
    """
    if composed_correlation(0.0, n_layers) <= FINAL_CORRELATION:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if composed_correlation(middle, n_layers) > FINAL_CORRELATION else (low, middle)
    return (low + high) / 2


def composed_correlation(slope: float, activations: int) -> float:
    """Correlation of two uncorrelated inputs after that many leaky relus: the C map of Zhang et al., composed."""
    weight = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    c = 0.0
    for _ in range(activations):
        c = min(1.0, c + weight * (math.sqrt(max(0.0, 1 - c * c)) - c * math.acos(c)))
    return c
