"""Closed forms and expansions against two-dimensional quadrature and against Monte Carlo."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm.theory import moments

FUNCTIONS = {function.name: function for function in (moments.RELU, moments.GELU, moments.SILU, moments.TANH)}
ACTIVATIONS = tuple(FUNCTIONS)
PAIRS = [(1.0, 0.3, 1.0), (2.0, 0.8, 0.5), (0.5, -0.6, 3.0), (0.1, 0.0, 10.0)]

_erf = np.vectorize(math.erf)


def _cdf(x):
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


VALUE = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * _cdf(x),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}
SLOPE = {
    "relu": lambda x: (x > 0).astype(float),
    "gelu": lambda x: _cdf(x) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
    "silu": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "tanh": lambda x: 1 / np.cosh(x) ** 2,
}


def integrate(f, k11: float, k12: float, k22: float) -> float:
    """E[f(x) f(y)] on a dense grid in the plane."""
    z = np.linspace(-9, 9, 401)
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    y = k12 / math.sqrt(k11) * z[:, None] + math.sqrt(max(k22 - k12**2 / k11, 0)) * z
    return float(weight @ (f(math.sqrt(k11) * z)[:, None] * f(y)) @ weight)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh"])
def test_kernels_agree_with_quadrature_also_at_unequal_variances(activation, pair):
    assert FUNCTIONS[activation].dual(*pair) == pytest.approx(integrate(VALUE[activation], *pair), abs=1e-9)
    assert FUNCTIONS[activation].dual_slope(*pair) == pytest.approx(integrate(SLOPE[activation], *pair), abs=1e-9)


@pytest.mark.parametrize("variance", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mean_and_second_moment_agree_with_quadrature(activation, variance):
    z = np.linspace(-9, 9, 4001)
    weight = np.exp(-(z**2) / 2)
    values = VALUE[activation](math.sqrt(variance) * z)
    mean, square = np.average(values, weights=weight), np.average(values**2, weights=weight)
    assert FUNCTIONS[activation].mean(variance) == pytest.approx(mean, abs=2e-6)
    assert FUNCTIONS[activation].second_moment(variance) == pytest.approx(square, abs=2e-6)
    assert FUNCTIONS[activation].dual(variance, variance, variance) == pytest.approx(square, abs=2e-6)


@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh"])
def test_kernels_of_wide_and_nearly_equal_inputs(activation):
    wide = (4.0, 3.9, 4.0)
    assert FUNCTIONS[activation].dual(*wide) == pytest.approx(integrate(VALUE[activation], *wide), rel=1e-5)
    assert FUNCTIONS[activation].dual_slope(*wide) == pytest.approx(integrate(SLOPE[activation], *wide), rel=2e-4)


def test_a_wide_tanh_keeps_its_mass_where_the_expansion_is_cut():
    """At variance 100 the expansion is far from converged; the remainder terms carry what it lacks."""
    assert moments.TANH.dual(100.0, 100.0, 100.0) == pytest.approx(moments.TANH.second_moment(100.0), rel=1e-6)
    assert moments.TANH.dual(100.0, 50.0, 100.0) == pytest.approx(integrate(np.tanh, 100, 50, 100), rel=1e-3)


@pytest.mark.parametrize("r", [0.0, 0.2, 0.8, -0.5])
def test_relu_and_leaky_relu_moments_by_sampling(r):
    rng = np.random.default_rng(0)
    s2, slope = 1.7, 0.3
    z = rng.standard_normal((2, 2_000_000))
    x, y = math.sqrt(s2) * z[0], math.sqrt(s2) * (r * z[0] + math.sqrt(1 - r**2) * z[1])
    assert moments.RELU.dual(s2, r * s2, s2) == pytest.approx((VALUE["relu"](x) * VALUE["relu"](y)).mean(), rel=0.01)
    assert moments.RELU.dual_slope(s2, r * s2, s2) == pytest.approx(((x > 0) & (y > 0)).mean(), rel=0.01)
    leaky_x, leaky_y = np.where(x > 0, x, slope * x), np.where(y > 0, y, slope * y)
    assert moments.LeakyRelu(slope).dual(s2, r * s2, s2) == pytest.approx((leaky_x * leaky_y).mean(), abs=0.005)
    slopes = np.where(x > 0, 1, slope) * np.where(y > 0, 1, slope)
    assert moments.LeakyRelu(slope).dual_slope(s2, r * s2, s2) == pytest.approx(slopes.mean(), rel=0.01)


def test_relu_correlation_at_known_points_and_its_quadratic():
    assert moments.relu_correlation([0.0, 0.5, 1.0]) == pytest.approx([0.3183099, 0.6089978, 1.0], abs=1e-7)
    r = np.linspace(0, 1, 101)
    assert np.abs(moments.relu_correlation(r) - (1 / np.pi + r / 2 + (0.5 - 1 / np.pi) * r**2)).max() < 0.008
    assert moments.relu_slope_correlation([0.0, 1.0]) == pytest.approx([0.5, 1.0])
    assert moments.RELU.second_moment(3.0) == pytest.approx(1.5)


def test_published_constants_of_gelu_and_silu():
    assert moments.GELU.mean(1.0) == pytest.approx(0.2821, abs=1e-4)
    assert moments.GELU.second_moment(1.0) == pytest.approx(0.4252, abs=1e-4)
    assert moments.GELU.dual_slope(1.0, 1.0, 1.0) == pytest.approx(0.4559, abs=1e-4)
    assert moments.SILU.second_moment(1.0) == pytest.approx(0.3557, abs=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_arrays_broadcast_to_what_single_pairs_give(activation):
    rows = np.random.default_rng(1).standard_normal((6, 8))
    kernel = rows @ rows.T / 8
    diagonal = np.diag(kernel)
    for function in (FUNCTIONS[activation].dual, FUNCTIONS[activation].dual_slope):
        together = function(diagonal[:, None], kernel, diagonal)
        full = function(np.diag(kernel)[:, None] + 0 * kernel, kernel, diagonal + 0 * kernel)
        single = [[function(diagonal[i], kernel[i, j], diagonal[j]) for j in range(6)] for i in range(6)]
        assert together == pytest.approx(np.array(single), rel=1e-9, abs=1e-9)
        assert together == pytest.approx(full, rel=1e-12, abs=1e-12)
    equal = FUNCTIONS[activation].dual(2.0, np.clip(kernel, -2, 2), 2.0)
    nearly = FUNCTIONS[activation].dual(2.0, np.clip(kernel, -2, 2), np.linspace(2.0, 2.0 + 1e-6, 6))
    assert equal == pytest.approx(nearly, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dead_channel_has_no_variance_and_no_correlation(activation):
    assert FUNCTIONS[activation].dual(0.0, 0.0, 0.0) == 0
    assert FUNCTIONS[activation].dual([[0.0], [1.0]], [[0.0], [0.5]], [[0.0], [1.0]])[0, 0] == 0


@settings(max_examples=60, deadline=None)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    a=st.floats(0.01, 20),
    b=st.floats(0.01, 20),
    r=st.floats(-1, 1),
)
def test_kernels_are_symmetric_and_obey_cauchy_schwarz(activation, a, b, r):
    c = r * math.sqrt(a * b)
    for function in (FUNCTIONS[activation].dual, FUNCTIONS[activation].dual_slope):
        value = function(a, c, b)
        assert value == pytest.approx(function(b, c, a), rel=1e-9, abs=1e-12)
        assert abs(value) <= math.sqrt(function(a, a, a) * function(b, b, b)) * (1 + 1e-9)


@pytest.mark.parametrize(("constant", "exact"), [(2.0, 0.806), (1.7008, 0.960)])
def test_gelu_feed_forward_variance_under_relu_and_gelu_constants(constant, exact):
    """DeepScaleLM's stds, sigma^2 = sqrt(1/constant)/d: GeLU is not homogeneous, so 1.7008 leaves 4 %."""
    rng = np.random.default_rng(3)
    d, std = 192, (1 / constant) ** 0.25 / math.sqrt(192)
    x = rng.standard_normal((384, d))
    hidden = VALUE["gelu"](x @ rng.normal(0, std, (d, 4 * d)))
    measured = (hidden @ rng.normal(0, std, (4 * d, d))).var()
    predicted = 4 * d * std**2 * moments.GELU.second_moment(d * std**2)
    assert predicted == pytest.approx(exact, abs=1e-3)
    assert measured == pytest.approx(predicted, rel=0.03)


def _correlated(rng, shape, mean, variance, covariance):
    """Rows are tokens: a part common to all of them, one draw a channel, and a part of their own."""
    common = rng.standard_normal((shape[0], 1, shape[2]))
    own = rng.standard_normal(shape)
    return mean + math.sqrt(covariance) * common + math.sqrt(variance - covariance) * own


def _variance_and_covariance(x):
    """Of a (batch, tokens, channels) array about the mean of all: covariance is between tokens."""
    x = x - x.mean()
    total = x.sum(axis=1)
    tokens = x.shape[1]
    covariance = ((total**2).mean() - (x**2).sum(axis=1).mean()) / (tokens * (tokens - 1))
    return float((x**2).mean()), float(covariance)


def test_causal_attention_variance_by_position():
    """A unit-variance input of token correlation .2 through random queries and keys; the values are the input."""
    rng = np.random.default_rng(8)
    r, d, length, d_head = 0.2, 256, 128, 64
    square = np.zeros(length)
    for _ in range(24):
        x = _correlated(rng, (1, length, d), 0.0, 1.0, r)[0]
        queries, keys = (x @ rng.normal(0, d**-0.5, (d, d_head)) for _ in range(2))
        weights = np.exp(queries @ keys.T / math.sqrt(d_head)) * np.tri(length)
        square += ((weights / weights.sum(axis=1, keepdims=True)) @ x).var(axis=1) / 24
    predicted = r + (1 - r) * moments.attention_spread(np.arange(1, length + 1), 1 - r)
    for position, stated in ((1, 1.0), (16, 0.30), (128, 0.21)):
        assert predicted[position - 1] == pytest.approx(stated, rel=0.03)
        assert square[position - 1] == pytest.approx(predicted[position - 1], rel=0.12)
    assert r + (1 - r) * moments.causal_means(length, 1 - r)[0] == pytest.approx(predicted.mean())
    assert square.mean() == pytest.approx(predicted.mean(), rel=0.07)


def test_causal_means():
    assert moments.causal_means(128, 1.0) == pytest.approx((0.0863, 0.0151), abs=1e-4)
    assert moments.causal_means(1, 1.0) == (1.0, 0.0)


@pytest.mark.parametrize(("vocab", "exact"), [(256, 0.0438), (4096, 0.0208), (32000, 0.0137), (50257, 0.0127)])
def test_token_collision_of_zipf_text(vocab, exact):
    p = 1 / np.arange(1, vocab + 1)
    p /= p.sum()
    assert moments.token_collision(vocab) == pytest.approx((p**2).sum(), rel=0.005)
    assert moments.token_collision(vocab) == pytest.approx(exact, abs=1e-4)


def test_dynamic_tanh():
    x = np.random.default_rng(9).normal(0, 1.5, 1_000_000)
    variance = moments.dyt_second_moment(0.8, 2.25)
    assert variance == pytest.approx((np.tanh(0.8 * x) ** 2).mean(), rel=0.01)
