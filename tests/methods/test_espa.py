"""E-SPA and its relatives: planned attention against Cholesky factors, the networks it makes, the activation."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from support.parity import assert_parity
from support.statistics import measure, resolved
from torch import Tensor

from stablelm.config.identity import differences
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods import e_spa as espa
from stablelm.methods.sizes import widths
from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions
from stablelm.model.decoder import Decoder
from stablelm.model.feedforward import FeedForward
from stablelm.model.initialise import initialise
from stablelm.model.linear import make_dtypes
from stablelm.probe.predict import predict
from stablelm.theory import faithful_attention as planning
from stablelm.theory.moments import LeakyRelu, token_collision

METHODS = ("e_spa", "u_spa", "value_skipinit", "e_spa_skips")
N_LAYERS = 36

Array = NDArray[np.float64]


def _config(*overrides: str, method: str = "e_spa", pieces: int = 500) -> ModelConfig:
    config = load([], [f"model.method={method}", "model.n_heads=4", "train.steps=5", *overrides]).config
    return resolve(config, pieces=pieces, world_size=1, accelerate_precision=None).model


def _sized(n_layers: int, d_model: int, seq_len: int, *overrides: str, method: str = "e_spa") -> ModelConfig:
    sizes = (f"model.n_layers={n_layers}", f"model.d_model={d_model}", f"data.seq_len={seq_len}")
    return _config(*sizes, *overrides, method=method)


# The plans, once more with whole matrices


def _decaying(gamma: float, seq_len: int) -> Array:
    """exp(-gamma |i - j|), the identity for gamma = inf."""
    distance = np.abs(np.subtract.outer(np.arange(seq_len), np.arange(seq_len)))
    return np.where(distance == 0, 1.0, np.exp(-min(gamma, 1e3) * np.maximum(distance, 1)))


def _uniform(correlation: float, seq_len: int) -> Array:
    return (1 - correlation) * np.eye(seq_len) + correlation


def _quotient(after: Array, before: Array) -> Array:
    """chol(after) chol(before)^-1."""
    return np.asarray(np.linalg.solve(np.linalg.cholesky(before).T, np.linalg.cholesky(after).T).T, dtype=np.float64)


def _fed(kernel: Array, slope: float) -> Array:
    """The C map of a leaky relu (Zhang et al. 2022, eq. 9)."""
    kernel = np.clip(kernel, -1, 1)
    weight = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    return np.minimum(kernel + weight * (np.sqrt(1 - kernel**2) - kernel * np.arccos(kernel)), 1)


def _plan(config: ModelConfig, seq_len: int) -> list[tuple[Array, Array, Array]]:
    """(A, the kernel it finds, the kernel it leaves) of each attention of e_spa or e_spa_skips, by whole matrices."""
    n_layers, kernel = config.n_layers, _uniform(float(token_collision(config.vocab_size or 0)), seq_len)
    slope, (skip, branch) = espa.tailored_slope(n_layers, 0.2), config.axes.stream.gains(config)
    gammas = [math.inf, *(planning.Decay(n_layers, 0.005).gamma(layer) for layer in range(1, n_layers + 1))]
    found = []
    for before, after in pairwise(gammas):
        weights = _quotient(_decaying(after, seq_len), _decaying(before, seq_len))
        weights /= weights.sum(axis=1, keepdims=True)
        attention = weights / np.sqrt(np.diagonal(weights @ kernel @ weights.T))[:, None]
        left = attention @ kernel @ attention.T
        found.append((attention, kernel, left))
        kernel = skip**2 * kernel + branch**2 * left
        kernel = skip**2 * kernel + branch**2 * _fed(kernel, slope)
    return found


def _attention(config: ModelConfig, layer: int, seq_len: int) -> Array:
    """D_l softmax(B_l): what zero queries make of the bias and the scale."""
    bias, rows = config.axes.shaping.bias_and_scale(config, layer, seq_len)
    weights = np.exp(bias)
    return rows[:, None] * weights / weights.sum(axis=1, keepdims=True)


def test_the_decay_falls_to_its_end_and_keeps_the_diagonal():
    decay = planning.Decay(N_LAYERS, 0.005)
    gammas = [decay.gamma(layer) for layer in range(1, N_LAYERS + 1)]
    assert gammas[-1] == pytest.approx(0.005, rel=1e-12)
    assert all(after < before for before, after in pairwise(gammas))
    for layer in (0, 1, 20, 35):
        diagonal = np.diagonal(np.exp(decay.log_rows(layer, np.arange(40), 40)))
        assert diagonal[0] == pytest.approx(1, abs=1e-12)
        assert diagonal[1:] == pytest.approx(0.93798, abs=1e-5)


@pytest.mark.parametrize("n_layers", [4, 36])
def test_the_decay_is_the_quotient_of_cholesky_factors(n_layers):
    decay, places = planning.Decay(n_layers, 0.005), np.arange(64)
    gammas = [math.inf, *(decay.gamma(layer) for layer in range(1, n_layers + 1))]
    columns = np.random.default_rng(0).standard_normal((64, 3))
    for layer, (before, after) in enumerate(pairwise(gammas)):
        wanted = _quotient(_decaying(after, 64), _decaying(before, 64))
        found = np.exp(decay.log_rows(layer, places, 64))
        assert np.abs(found - wanted).max() < 1e-9
        assert not np.triu(found, 1).any()
        assert np.abs(decay.apply(layer, columns) - wanted @ columns).max() < 1e-9


@pytest.mark.parametrize(("method", "n_layers"), [("e_spa", 4), ("e_spa", 24), ("e_spa_skips", 12)])
def test_attention_is_planned_for_what_feed_forwards_do_to_the_kernel(method, n_layers):
    seq_len = 48
    config = _sized(n_layers, 32, seq_len, method=method)
    for layer, (attention, found, left) in enumerate(_plan(config, seq_len)):
        ours = _attention(config, layer, seq_len)
        assert ours.min() >= 0
        assert np.abs(ours - attention).max() < 1e-9
        assert np.abs(_quotient(left, found) - ours).max() < 1e-6
        assert np.diagonal(left) == pytest.approx(1, abs=1e-9)


def test_a_decay_that_feed_forwards_do_not_change_needs_negative_weights():
    decay, slope, least = planning.Decay(24, 0.005), espa.tailored_slope(24, 0.2), 0.0
    for layer in range(1, 24):
        before = _fed(_decaying(decay.gamma(layer), 48), slope)
        least = min(least, _quotient(_decaying(decay.gamma(layer + 1), 48), before).min())
    assert -0.05 < least < -1e-4


def test_a_uniform_kernel_is_met_exactly():
    n_layers, seq_len = 24, 48
    config = _sized(n_layers, 32, seq_len, method="u_spa")
    slope, kernel = (
        espa.tailored_slope(n_layers, 0.2),
        _uniform(float(token_collision(config.vocab_size or 0)), seq_len),
    )
    left, shares = kernel, []
    for layer in range(n_layers):
        attention = _attention(config, layer, seq_len)
        left = attention @ kernel @ attention.T
        assert attention.min() >= 0
        assert np.abs(left - _uniform(left[1, 0], seq_len)).max() < 1e-9
        assert np.abs(_quotient(left, kernel) - attention).max() < 1e-9
        shares.append((1 - left[1, 0]) / (1 - kernel[1, 0]))
        kernel = _fed(left, slope)
    assert left[1, 0] == pytest.approx(0.8, abs=1e-9)
    assert shares == pytest.approx([shares[0]] * n_layers, abs=1e-9)


@pytest.mark.parametrize("method", ["e_spa", "u_spa"])
def test_a_row_depends_on_no_later_token(method):
    config = _sized(6, 32, 300, method=method)
    bias, rows = config.axes.shaping.bias_and_scale(config, 4, 300)
    short_bias, short_rows = config.axes.shaping.bias_and_scale(config, 4, 20)
    assert np.abs(short_rows - rows[:20]).max() < 1e-12
    assert np.abs(np.exp(short_bias) - np.exp(bias[:20, :20])).max() < 1e-12
    places = np.array([3, 250, 3])
    some_bias, some_rows = config.axes.shaping.rows(config, 4, places, 300)
    assert np.array_equal(some_bias, bias[places]) and np.array_equal(some_rows, rows[places])


@pytest.mark.parametrize("method", ["e_spa", "u_spa"])
def test_long_sequences_have_no_infinite_bias_below_the_diagonal(method):
    seq_len = 1500
    config = _sized(3, 32, seq_len, method=method)
    bias, rows = config.axes.shaping.bias_and_scale(config, 2, seq_len)
    assert np.isfinite(bias[np.tril_indices(seq_len)]).all()
    assert np.isneginf(bias[np.triu_indices(seq_len, 1)]).all()
    assert np.ptp(rows[1000:]) < 1e-3  # what comes after five decay lengths


# The models


def _decoder(config: ModelConfig, precision: str, seed: int = 0) -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, seed)
    return decoder


@pytest.mark.parametrize("logit_cap", [0.0, 30.0])
def test_attention_at_the_start_does_not_see_its_input(logit_cap):
    config = _sized(4, 32, 24, f"model.attention.logit_cap={logit_cap}")
    decoder = _decoder(config, "fp64")
    attention = decoder.get_submodule("layers.2.attention.body")
    assert isinstance(attention, Attention) and attention.output is not None
    assert not decoder.get_parameter("layers.2.attention.body.query.weight").any()
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
    assert attention.output is not None
    wanted = torch.from_numpy(_attention(config, 2, 24)) @ value @ attention.output.weight.T
    for _ in range(2):
        x = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
        both = torch.cat((attention.query(x), attention.key(x)), dim=-1)
        found = attention((both, value), Positions())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def _plain_loss(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """The model of equations, written out: weights by name, tokens (batch, seq + 1); no positions."""
    x, seq_len, heads = weights["embedding.weight"][tokens[:, :-1]], tokens.shape[1] - 1, config.n_heads
    skip, branch = (0.98, math.sqrt(1 - 0.98**2)) if config.method == "e_spa_skips" else (0.0, 1.0)
    slope, plan = espa.tailored_slope(config.n_layers, 0.2), None
    if config.method in ("e_spa", "e_spa_skips"):
        plan = [attention for attention, _, _ in _plan(config, seq_len)]
    elif config.method == "u_spa":
        plan = [_attention(config, layer, seq_len) for layer in range(config.n_layers)]  # tested against chol above
    for layer in range(config.n_layers):
        attention = f"layers.{layer}.attention.body"
        query, key, value = (
            (x @ weights[f"{attention}.{kind}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
            for kind in ("query", "key", "value")
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        logits = logits + torch.full((seq_len, seq_len), -math.inf, dtype=x.dtype).triu(1)
        if plan is None:
            mixed = weights[f"{attention}.own_gain"] * value
            mixed = mixed + weights[f"{attention}.average_gain"] * (logits.softmax(dim=-1) @ value)
        else:
            planned = torch.from_numpy(plan[layer])
            rows = planned.sum(dim=1, keepdim=True)
            mixed = rows * ((logits + (planned / rows).log()).softmax(dim=-1) @ value)
        out = mixed.transpose(1, 2).flatten(-2) @ weights[f"{attention}.output.weight"].T
        x = skip * x + branch * out
        feedforward = f"layers.{layer}.feedforward.body"
        hidden = x @ weights[f"{feedforward}.fc1.weight"].T
        hidden = torch.where(hidden > 0, hidden, slope * hidden) * math.sqrt(2 / (1 + slope**2))
        x = skip * x + branch * (hidden @ weights[f"{feedforward}.fc2.weight"].T)
    return F.cross_entropy((x @ weights["head.weight"].T).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_equations(method, record_property):
    config = _sized(3, 32, 20, "model.attention.position=none", method=method)
    decoder, generator = _decoder(config, "fp64"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    tokens = torch.randint(0, config.vocab_size or 0, (2, 21), generator=generator)
    sums = decoder(tokens[:, :-1], tokens[:, 1:])
    ours = sums.total / sums.valid
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    wanted = _plain_loss(dict(zip(names, parameters, strict=True)), config, tokens)
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(wanted, parameters), strict=True)
    assert_parity(record_property, method, (ours, wanted), dict(zip(names, pairs, strict=True)))


SIZES = [
    (12, 128),
    pytest.param(24, 256, marks=pytest.mark.slow),
    pytest.param(96, 256, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("n_layers", "d_model"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_the_stream_is_as_planned_at_every_layer(method, n_layers, d_model):
    """Variances, correlations, gradients and the first loss; the theory is that of repeated tokens, too."""
    config = resolved(method, n_layers, d_model)
    measured = measure(config, 0)
    predicted = predict(config, seq_len=128, tokens=256, collision=measured.collision)
    assert measured.stream_variance.min() > 0.8 and measured.stream_variance.max() < 1.25
    for name in ("stream_variance", "attention_branch_variance", "feedforward_branch_variance"):
        ratio = (getattr(predicted, name) / getattr(measured, name))[1:]
        assert ratio.min() > 0.8 and ratio.max() < 1.25, name
    assert np.abs(predicted.token_correlation - measured.token_correlation).max() < 0.08
    assert np.abs(np.log(predicted.gradient_norm / measured.gradient_norm)).max() < 0.2
    assert abs(measured.loss - math.log(config.vocab_size or 0)) < 0.35


@pytest.mark.parametrize("method", ["e_spa", "u_spa"])
def test_few_values_let_the_size_wander_by_as_much_as_predicted(method):
    """Each layer keeps another part of the stream: right in the mean, and draws differ more from layer to layer."""
    config = resolved(method, 12, 64, "model.kv_heads=2", n_heads=8)
    measured = [measure(config, seed) for seed in range(12)]
    predicted = predict(config, seq_len=128, tokens=256, collision=float(np.mean([m.collision for m in measured])))
    sizes = np.array([m.attention_branch_variance[1:] for m in measured])
    assert np.abs(np.log((sizes / predicted.attention_branch_variance[1:]).mean(axis=0))).max() < 0.4
    spread = predicted.attention_branch_spread[1:]
    found = np.log(sizes).std(axis=0, ddof=1)
    assert spread[-1] > 0.5 > 0.1 > spread[0] and (np.diff(spread) > 0).all()
    assert np.abs(np.log(found[5:] / spread[5:])).max() < 0.5
    whole = predict(resolved(method, 12, 64, n_heads=8), seq_len=128, tokens=256).attention_branch_spread[1:]
    assert (whole == 0).all()


def test_both_maps_of_a_feed_forward_together_are_orthogonal():
    decoder = _decoder(_sized(2, 64, 8), "fp32")
    first, second = (decoder.get_parameter(f"layers.1.feedforward.body.{kind}.weight") for kind in ("fc1", "fc2"))
    both = second @ first
    for product, wanted in ((first.T @ first, 4), (second @ second.T, 1), (both @ both.T, 1)):
        torch.testing.assert_close(product, wanted * torch.eye(64), rtol=0, atol=1e-5)
    assert both.diagonal().abs().mean() < 0.3
    narrow = _decoder(_sized(2, 64, 8, "model.d_ff=96"), "fp32").get_parameter("layers.1.feedforward.body.fc2.weight")
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(64), rtol=0, atol=1e-5)


REFUSED = [
    (("model.dropout=0.1",), "model.dropout=0"),
    (("model.placement=pre", "model.activation=relu", "model.n_layers=48"), "fewer layers"),
    (("model.attention.shaping=uspa", "model.e_spa.uniform=0.1"), "a higher model.e_spa.uniform"),
    (("model.method=e_spa_skips", "model.attention.shaping=uspa"), "model.stream=skipless"),
    (("model.method=e_spa_skips", "model.placement=sub"), "model.placement=none or pre"),
    (("model.method=e_spa_skips", "model.activation=gelu"), "model.activation=tailored"),
]


@pytest.mark.parametrize(("overrides", "fix"), REFUSED)
def test_what_no_plan_reaches_is_refused(overrides, fix):
    with pytest.raises(ConfigError) as caught:
        _config(*overrides)
    assert fix in str(caught.value).rsplit("; use ", 1)[1]


def test_a_run_with_an_earlier_slope_is_another_run():
    key = "model.e_spa.nonlinearity"
    saved = {"data.order": 2, "model.activation": "tailored"}
    (line,) = differences(saved, saved | {key: 0.2})
    assert key in line and "0.9" in line
    saved["model.activation"] = "gelu"
    assert not differences(saved, saved | {key: 0.2})


# The tailored activation


@pytest.mark.parametrize(("activations", "slope"), [(18, 0.1461), (36, 0.3511), (72, 0.5084), (192, 0.6739)])
def test_slope_of_a_known_depth(activations, slope):
    found = espa.tailored_slope(activations, 0.9)
    assert found == pytest.approx(slope, abs=5e-4)
    assert espa.composed_correlation(found, activations) == pytest.approx(0.9, abs=1e-9)


def test_few_activations_cannot_reach_the_correlation():
    assert espa.composed_correlation(0.0, 12) < 0.9 < espa.composed_correlation(0.0, 13)
    assert espa.tailored_slope(12, 0.9) == 0
    assert espa.tailored_slope(13, 0.9) > 0


@pytest.mark.parametrize("n_layers", [8, 36, 192])
def test_the_activation_keeps_the_second_moment_and_maps_correlation_as_composed(n_layers):
    config = _sized(n_layers, 32, 8, "model.d_ff=2", "model.e_spa.nonlinearity=0.9", method="value_skipinit")
    body = FeedForward(config, make_dtypes("fp64", "fp32"), widths(config, 1), 1)
    slope = espa.tailored_slope(n_layers, 0.9)
    with torch.no_grad():
        body.fc2.weight.copy_(torch.eye(32, 2))
        x = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = torch.stack((x[:, 0], 0.3 * x[:, 0] + math.sqrt(1 - 0.09) * x[:, 1]), dim=1)
        y = body((x,))[:, :2]
    assert y.square().mean().item() == pytest.approx(1, rel=0.01)
    weight = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    wanted = 0.3 + weight * (math.sqrt(1 - 0.09) - 0.3 * math.acos(0.3))
    assert (y[:, 0] * y[:, 1]).mean().item() == pytest.approx(wanted, abs=0.005)


def test_a_plan_knows_any_activation():
    plain = planning.Setting(3, 0.1, LeakyRelu(0.5))
    gated = replace(plain, gated=True)
    kernel = np.array([[1.0, 0.3], [0.3, 1.0]])
    assert plain.fed(kernel) == pytest.approx(_fed(kernel, 0.5), abs=1e-12)
    assert gated.fed(kernel) == pytest.approx(_fed(kernel, 0.5) * kernel, abs=1e-12)
    skips = replace(plain, skip=0.6, branch=0.8)
    assert skips.fed(kernel) == pytest.approx(0.36 * kernel + 0.64 * _fed(kernel, 0.5), abs=1e-12)
