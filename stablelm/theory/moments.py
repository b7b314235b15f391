"""Moments of activations, causal attention and embeddings at initialisation, forward and backward.

Every function is elementwise in float64 and broadcasts. Kernels are UNCENTRED second moments, which is what
the next linear map sees. Correlations r are between tokens, of one channel. What is ours is marked "derived here".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stablelm.theory import hermite

Array = NDArray[np.float64]
EULER_GAMMA = 0.5772156649015329


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _silu_slope(x: Array) -> Array:
    gate = _sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def _tanh_slope(x: Array) -> Array:
    return 1.0 - np.tanh(x) ** 2


def _float(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)


def relu_correlation(r: ArrayLike) -> Array:
    """f(r): uncentred correlation of relu(x), relu(y) at input correlation r (Cho & Saul 2009, kernel of order 1)."""
    r = np.clip(_float(r), -1.0, 1.0)
    return r + (np.sqrt(1 - r**2) - r * np.arccos(r)) / np.pi


def relu_slope_correlation(r: ArrayLike) -> Array:
    """1/2 + asin(r)/pi: correlation of relu'(x), relu'(y) (Cho & Saul 2009, kernel of order 0)."""
    return 0.5 + np.arcsin(np.clip(_float(r), -1.0, 1.0)) / np.pi


def _scale_and_correlation(k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> tuple[Array, Array]:
    scale = np.sqrt(_float(k11) * _float(k22))
    k12 = _float(k12)
    zero = np.zeros(np.broadcast(scale, k12).shape)
    return scale, np.clip(np.divide(k12, scale, out=zero, where=scale > 0), -1.0, 1.0)


def _gelu_parts(k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> tuple[Array, Array, Array]:
    """P = E[Phi(x) Phi(y)], Q = E[phi(x) phi(y)] with the normal distribution and density, and det(I + K)."""
    a, c, b = 1 + _float(k11), _float(k12), 1 + _float(k22)
    determinant = a * b - c**2
    return 0.25 + np.arcsin(c / np.sqrt(a * b)) / (2 * np.pi), 1 / (2 * np.pi * np.sqrt(determinant)), determinant


class Function:
    """A pointwise function phi and its integrals over Gaussians; in each, arguments broadcast.

    `dual`: E[phi(x) phi(y)] for zero-mean x, y of covariance [[k11, k12], [k12, k22]], uncentred; `dual_slope`:
    E[phi'(x) phi'(y)], the factor a gradient's covariance takes; `mean`: E[phi(x)] for x ~ N(0, variance).
    """

    name: str

    def dual(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        raise NotImplementedError

    def dual_slope(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        raise NotImplementedError

    def mean(self, variance: ArrayLike) -> Array:
        raise NotImplementedError

    def second_moment(self, variance: ArrayLike) -> Array:
        """E[phi(x)^2] for x ~ N(0, variance)."""
        v = _float(variance)
        return self.dual(v, v, v)


@dataclass(frozen=True)
class LeakyRelu(Function):
    """x for x > 0, else slope x; slope 0 is the ReLU (Cho & Saul 2009; its mean: Kedia et al. 2024).

    The kernel is (1 - slope)^2 that of the ReLU + slope k12 (derived here).
    """

    slope: float = 0.0
    name: str = "relu"

    def dual(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        scale, r = _scale_and_correlation(k11, k12, k22)
        return ((1 - self.slope) ** 2 * scale * relu_correlation(r) / 2 + self.slope * _float(k12))[()]

    def dual_slope(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        _, r = _scale_and_correlation(k11, k12, k22)
        return ((1 - self.slope) ** 2 * relu_slope_correlation(r) / 2 + self.slope)[()]

    def mean(self, variance: ArrayLike) -> Array:
        return (1 - self.slope) * np.sqrt(_float(variance) / (2 * np.pi))


@dataclass(frozen=True)
class Gelu(Function):
    """GELU with erf: closed forms by Stein's lemma.

    At k11 = k22 that of Kedia et al. 2024; unequal variances derived here.
    """

    name: str = "gelu"

    def dual(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        p, q, _ = _gelu_parts(k11, k12, k22)
        a, c, b = _float(k11), _float(k12), _float(k22)
        return (c * p + q * (a * b + c**2 * (1 / (1 + a) + 1 / (1 + b) - 1)))[()]

    def dual_slope(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        p, q, determinant = _gelu_parts(k11, k12, k22)
        a, c, b = _float(k11), _float(k12), _float(k22)
        return (p + q * c * (1 / (1 + a) + 1 / (1 + b) + 1 / determinant))[()]

    def mean(self, variance: ArrayLike) -> Array:
        v = _float(variance)
        return v / np.sqrt(2 * np.pi * (1 + v))


@dataclass(frozen=True)
class Expanded(Function):
    """A smooth function by its Hermite expansion (`hermite.kernel`) and by quadrature."""

    name: str
    function: Callable[[Array], Array]
    slope: Callable[[Array], Array]

    def dual(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        return hermite.kernel(self.function, k11, k12, k22)

    def dual_slope(self, k11: ArrayLike, k12: ArrayLike, k22: ArrayLike) -> Array:
        return hermite.kernel(self.slope, k11, k12, k22)

    def mean(self, variance: ArrayLike) -> Array:
        return hermite.expectation(self.function, _float(variance))

    def second_moment(self, variance: ArrayLike) -> Array:
        return hermite.expectation(lambda x: self.function(x) ** 2, _float(variance))


@lru_cache(maxsize=64)
def gate_function(mean: float) -> Function:
    """sigmoid(mean + x)."""

    def gate(x: Array) -> Array:
        return _sigmoid(mean + x)

    def slope(x: Array) -> Array:
        return gate(x) * (1 - gate(x))

    return Expanded("sigmoid", gate, slope)


RELU, GELU = LeakyRelu(), Gelu()
SILU, TANH = Expanded("silu", _silu, _silu_slope), Expanded("tanh", np.tanh, _tanh_slope)


def dyt_second_moment(alpha: ArrayLike, variance: ArrayLike) -> Array:
    """E[tanh(alpha x)^2] for x ~ N(0, variance): dynamic tanh (arXiv 2503.10622) with unit gain, by quadrature."""
    return TANH.second_moment(_float(alpha) ** 2 * _float(variance))


def attention_spread(position: ArrayLike, q: ArrayLike) -> Array:
    """E[sum_j P_ij^2] of the causal row at 1-based `position`: e^q / (e^q + position - 1) (derived here).

    `q` is the variance of the logits about their row mean. A row's variance is then r + (1 - r) spread.
    """
    growth = np.exp(_float(q))
    return growth / (growth + _float(position) - 1)


def causal_means(seq_len: int, q: float) -> tuple[float, float]:
    """(m1, m2) of causal attention over seq_len positions (derived here).

    m1: mean spread of a row; m2: mean over pairs of rows of sum_k P_ik P_jk, uniform attention taken, so that
    output variance is r + (1 - r) m1 and covariance between tokens r + (1 - r) m2, relative to the input's.
    """
    positions = np.arange(1, seq_len + 1, dtype=np.float64)
    pairs = seq_len * (seq_len - 1) / 2
    m2 = ((positions - 1) / positions).sum() / pairs if pairs else 0.0
    return float(attention_spread(positions, q).mean()), float(m2)


def token_collision(vocab_size: ArrayLike) -> Array:
    """Probability that two positions of Zipf text (p ~ 1/rank) hold the same token.

    sum_v p_v^2 = (pi^2/6) / H_V^2 with the harmonic number H_V ~ ln V + Euler's constant.
    """
    return (np.pi**2 / 6) / (np.log(_float(vocab_size)) + EULER_GAMMA) ** 2
