"""Causal attention matrices that give the tokens' kernel a planned shape at every layer (He et al., ICLR 2023).

A matrix is A = D P with rows P that sum to one, which a softmax of fixed logits makes, and a factor D of each row.
Two families of P: that of an exponential decay, P ~ L_l L_(l-1)^-1 with the Cholesky factors L of exp(-gamma |i - j|),
and that of a uniform kernel, (1 - rho) I + rho 11^T. Both have closed forms (derived here). What the feed-forwards
between the attentions do to the kernel enters the plan: D keeps the variance at 1, whatever it is.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.moments import Function

Array = NDArray[np.float64]

SHORTEST = 64
"""Positions that a plan has at least, so that short sequences share one."""
TIMES = 5.0
"""Positions are planned up to this many decay lengths 1 / gamma_N; later ones have the factor of the last."""


@dataclass(frozen=True)
class Setting:
    """What a plan depends on: the correlation of two tokens' embeddings, the feed-forwards' function of Gaussian
    features of variance 1 (times features, if `gated`), and the gains of skip and branch of the stream."""

    n_layers: int
    collision: float
    function: Function
    gated: bool = False
    skip: float = 0.0
    branch: float = 1.0

    def fed(self, kernel: Array) -> Array:
        """The kernel, of diagonal 1, after a feed-forward whose output has variance 1."""
        one = np.ones(())
        changed = np.asarray(self.function.dual(one, kernel, one)) / float(self.function.dual(one, one, one))
        return self.skip**2 * kernel + self.branch**2 * (changed * kernel if self.gated else changed)

    def fed_alone(self, times: int) -> float:
        """Correlation of two tokens after that many feed-forwards, without attention."""
        kernel = np.asarray(self.collision, dtype=np.float64)
        for _ in range(times):
            kernel = np.minimum(self.fed(kernel), 1.0)
        return float(kernel)


# The exponential decay


@dataclass(frozen=True)
class Decay:
    """exp(-gamma_l |i - j|), gamma_l = -ln(1 - a_l^2) / 2 with a_l = a_N^(l / N) and a_N^2 = 1 - exp(-2 gamma_N).

    Geometric in the innovation a_l = sqrt(1 - exp(-2 gamma_l)) of an AR(1) process, so that all layers have the same
    diagonal. `last`: gamma_N.
    """

    n_layers: int
    last: float

    def innovation(self, layer: int) -> float:
        """a after `layer` layers (from 1)."""
        return math.sqrt(-math.expm1(-2 * self.last)) ** (layer / self.n_layers)

    def gamma(self, layer: int) -> float:
        return -0.5 * math.log1p(-(self.innovation(layer) ** 2))

    def log_rows(self, layer: int, places: NDArray[np.int64], length: int) -> Array:
        """log (L_l L_(l-1)^-1) of layer `layer` (from 0): rows `places` (n,), (n, length), -inf above the diagonal.

        With phi = exp(-gamma), a = sqrt(1 - phi^2) and primes for the layer before: A_11 = 1, A_ii = a / a',
        A_ij = (a / a') (phi - phi') phi^(i-j-1), A_i1 = phi^(i-2) (phi - a phi' / a'). Logs, because entries span
        hundreds of orders of magnitude. A row does not depend on `length`.
        """
        a, before = self.innovation(layer + 1), self.innovation(layer)
        phi, phi_before = math.sqrt(1 - a * a), math.sqrt(max(0.0, 1 - before * before))
        log_phi, log_ratio = math.log(phi), math.log(a / before)
        distance = np.subtract.outer(places.astype(np.float64), np.arange(length, dtype=np.float64))
        logs = log_ratio + math.log(phi - phi_before) + (distance - 1) * log_phi
        logs[:, 0] = distance[:, 0] * log_phi - log_phi + math.log(phi - a / before * phi_before)
        logs[distance == 0] = log_ratio
        logs[places == 0, 0] = 0.0
        logs[distance < 0] = -np.inf
        return logs

    def apply(self, layer: int, columns: Array) -> Array:
        """L_l L_(l-1)^-1 times a matrix, (T, n): innovations of one process drive the other."""
        a, before = self.innovation(layer + 1), self.innovation(layer)
        phi, phi_before = math.sqrt(1 - a * a), math.sqrt(max(0.0, 1 - before * before))
        result = columns.copy()
        result[1:] = (columns[1:] - phi_before * columns[:-1]) * (a / before)
        for i in range(1, len(result)):
            result[i] += phi * result[i - 1]
        return result


@lru_cache(maxsize=8)
def decay_factors(setting: Setting, decay: Decay, length: int) -> Array:
    """D of all layers and of the first positions, (n_layers, positions), for sequences of up to `length` tokens.

    The plan, from the embeddings' kernel on: rows of P average, D brings the variance back to 1, the stream takes
    skip^2 and branch^2 of its own kernel and the branch's, and so do the feed-forwards.
    """
    kernels = planned_kernels(setting, decay, planned_length(decay, length))
    return np.stack([factors for factors, _ in kernels])


def planned_length(decay: Decay, length: int) -> int:
    """Positions of the plan for that many tokens: a power of two, so that growing sequences share it, and no more than
    matter."""
    most = max(SHORTEST, math.ceil(TIMES / decay.last))
    return min(most, max(SHORTEST, 1 << (length - 1).bit_length()))


def planned_kernels(setting: Setting, decay: Decay, size: int) -> "list[tuple[Array, Array]]":
    """(D, the stream's kernel after the layer) of each layer over `size` positions; see `decay_factors`."""
    kernel = np.full((size, size), setting.collision)
    np.fill_diagonal(kernel, 1.0)
    found = []
    for layer in range(setting.n_layers):
        mixed = decay.apply(layer, decay.apply(layer, kernel).T)
        std = np.sqrt(np.diagonal(mixed))
        factors = decay.apply(layer, np.ones((size, 1)))[:, 0] / std
        mixed = mixed / np.outer(std, std)
        kernel = setting.fed(np.clip(setting.skip**2 * kernel + setting.branch**2 * mixed, -1.0, 1.0))
        np.fill_diagonal(kernel, 1.0)
        found.append((factors, kernel))
    return found


def at_places(factors: Array, places: NDArray[np.int64]) -> Array:
    """The factors of a layer, (positions,), at `places`; the last one beyond what is planned."""
    return factors[np.minimum(places, len(factors) - 1)]


# The uniform kernel


@lru_cache(maxsize=8)
def uniform_plan(setting: Setting, last: float) -> "tuple[tuple[float, float], ...]":
    """(correlation before, correlation after) each attention, `last` after the last; () where that is out of reach.

    Attention takes 1 - rho to the same share of itself at every layer. The feed-forwards map a uniform kernel to a
    uniform one, so the plan is exact: A = chol(after) chol(before)^-1.
    """
    if _uniform_path(setting, 1.0)[-1][1] >= last:
        return ()
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _uniform_path(setting, middle)[-1][1] > last else (low, middle)
    return tuple(_uniform_path(setting, (low + high) / 2))


def _uniform_path(setting: Setting, share: float) -> "list[tuple[float, float]]":
    found, r = [], setting.collision
    for _ in range(setting.n_layers):
        after = 1 - share * (1 - r)
        found.append((r, after))
        r = float(setting.fed(np.asarray(after)))
    return found


def uniform_rows(before: float, after: float, places: NDArray[np.int64], length: int) -> Array:
    """Rows `places` (n,) of chol((1 - after) I + after 11^T) chol((1 - before) I + before 11^T)^-1, (n, length).

    With s_k^2 = (1 - r)(1 + k r) / (1 + (k - 1) r) the variance of token k (from 0) about its mean given the ones
    before, b_k = r / (1 + (k - 1) r) their weights in that mean, primes for `before`, g = s / s' and
    h_k = r g_k / (1 + k r): A_kk = g_k, A_kj = h_j + sum_(m <= j) h_m b'_m - sum_(m < k) h_m b'_m - g_k b'_k.
    """
    k = np.arange(length, dtype=np.float64)
    one = np.where(k == 0, 1.0, (1 - after) * (1 + k * after) / (1 + (k - 1) * after))
    other = np.where(k == 0, 1.0, (1 - before) * (1 + k * before) / (1 + (k - 1) * before))
    g = np.sqrt(one / other)
    weights = np.where(k == 0, 0.0, before / (1 + (k - 1) * before))
    h = after * g / (1 + k * after)
    sums = np.cumsum(h * weights)
    rows = (h + sums)[None, :] - (sums - h * weights + g * weights)[places][:, None]
    rows[np.arange(length)[None, :] > places[:, None]] = 0.0
    rows[np.arange(len(places)), places] = g[places]
    return rows
