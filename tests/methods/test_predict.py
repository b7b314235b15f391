"""Predicted and measured signal and gradient of real models at initialisation, at every layer.

Bands come from the spread of one finite model about the prediction. Tokens share directions, at worst one, so each
map of d outputs draws its common part with relative variance 2 / d. That gives, as relative SD of one seed:

- the stream sqrt(2 / d): writes onto a stream whose memory they also fade have that stationary variance, and so have
  the independent ones that add up to a growing stream;
- a branch of attention sqrt(2 / d_values + 2 / d_branch), of feed-forward sqrt(5 / d_ff + 2 / d_branch), 5 the
  relative variance of relu^2; their mean over layers hardly less for attention, which reads a correlation that all
  layers share: sqrt(1 / d), against sqrt(0.1 / d);
- r / (1 - r), the common part over the tokens' own, of correlation r: sqrt(8 / d), for the four maps of one layer;
- the logarithm of the gradient's norm: per sub-layer (s - s^2 / 2) / d of variance, s the share of the stream that is
  its branch, from the cross term of skip and branch (4 s (1 - s) / d of the square) and the branch's own (2 s^2 / d).
  It is a random walk over the layers above. Twice that variance, for a body has two maps.

A band is three SD of the mean over seeds, four and a half for branches, whose layers draw anew, and an allowance for
what the theory leaves out: 0.05 of attention branches, whose rows it averages, and up to 0.2 of r / (1 - r) in the
first layers. Where tokens have collapsed there is no prediction of gradients.
"""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from support.statistics import Gradients, Measured, average, measure, resolved

from stablelm.config.schema import ModelConfig
from stablelm.methods.sizes import d_key_value, widths
from stablelm.probe.predict import Prediction, predict

Array = NDArray[np.float64]

METHODS = (
    "pre_ln",
    "post_ln",
    "deepscalelm_pre",
    "deepscalelm_post",
    "magneto",
    "sigma_reparam",
    "catformer",
    "deepnorm",
)
# A model of spectrally normalised matrices is its plain twin (tested below), and starts slowly.
PLAIN_METHODS = tuple(method for method in METHODS if method != "sigma_reparam")
# Norms that differ between sub-layers, and learned factors of skips and branches.
PLACED_METHODS = ("keel", "mix_ln", "layerscale", "skipinit", "admin", "normformer", "resi_dual")


def _predict(config: ModelConfig, measured: Measured, batch: int = 2) -> Prediction:
    assert config.max_seq_len is not None
    seq_len = config.max_seq_len
    return predict(config, seq_len=seq_len, tokens=batch * seq_len, collision=measured.collision)


def _branch_spread(config: ModelConfig) -> tuple[Array, Array]:
    """Relative SD of one seed's attention and feed-forward branch variance, (n_layers,) each."""
    assert config.d_ff is not None
    each = [widths(config, index) for index in range(2 * config.n_layers)]
    attention = [math.sqrt(2 / d_key_value(config) + 2 / width.branch) for width in each[0::2]]
    return np.array(attention), np.array([math.sqrt(5 / config.d_ff + 2 / width.branch) for width in each[1::2]])


def _shares(config: ModelConfig, prediction: Prediction) -> Array:
    """The share of the stream's variance after each sub-layer that is its branch, (2 n_layers,)."""
    if config.stream == "concat":
        each = [widths(config, index) for index in range(2 * config.n_layers)]
        return np.array([width.branch / (width.read + width.branch) for width in each])
    shares, before = [], prediction.stream_variance[0]
    branches = (prediction.attention_branch_variance[1:], prediction.feedforward_branch_variance[1:])
    for index, branch in enumerate(np.stack(branches, axis=1).flatten()):
        keep, write = (factor**2 for factor in config.axes.stream.gains_at_start(config, index))
        after = keep * before + write * branch
        shares.append(write * branch / after)
        before = 1.0 if config.axes.placement.at(config, index).after_write else after
    return np.array(shares)


def _gradient_spread(config: ModelConfig, prediction: Prediction) -> Array:
    """SD of one seed's log of the gradient's norm over that at the end, (n_layers + 1,)."""
    share = _shares(config, prediction)
    by_layer = 2 * (share - share**2 / 2).reshape(-1, 2).sum(axis=1) / config.d_model
    return np.sqrt(np.append(np.cumsum(by_layer[::-1])[::-1], 0.0))


def _odds(correlation: Array) -> Array:
    correlation = np.minimum(correlation, 1 - 1e-9)  # collapsed tokens round to 1
    return np.log(correlation / (1 - correlation))


def _signal_misses(config: ModelConfig, prediction: Prediction, measured: Measured, mean: float) -> dict[str, bool]:
    d, off = config.d_model, {}
    deviation = np.log(measured.stream_variance / prediction.stream_variance)
    off["stream"] = np.abs(deviation).max() > 3 * math.sqrt(2 / d) * mean + 0.05
    for kind, spread, allowed, common in zip(
        ("attention", "feedforward"), _branch_spread(config), (0.05, 0.02), (1 / d, 0.1 / d), strict=True
    ):
        name = f"{kind}_branch_variance"
        ratio = getattr(measured, name)[1:] / getattr(prediction, name)[1:]
        off[kind] = (np.abs(np.log(ratio)) > 4.5 * spread * mean + allowed).any()
        spread_of_mean = math.sqrt(common + (spread**2).mean() / len(spread))
        off[f"{kind} mean"] = abs(ratio.mean() - 1) > 3 * spread_of_mean * mean + allowed
    deviation = np.abs(_odds(measured.token_correlation) - _odds(prediction.token_correlation))
    close = np.abs(measured.token_correlation - prediction.token_correlation) < 0.02
    off["correlation"] = (~close & (deviation > 3 * math.sqrt(8 / d) * mean + 0.2)).any()
    return off


def _gradient_misses(config: ModelConfig, prediction: Prediction, measured: Measured, mean: float) -> dict[str, bool]:
    if np.isnan(prediction.gradient_norm).all():
        return {"no gradient": prediction.token_correlation.max() < 0.99}
    deviation = np.log(measured.gradient_norm / prediction.gradient_norm)
    walk = np.abs(deviation - deviation[-1])
    return {
        "gradient": abs(deviation[-1]) > 1.5 * math.sqrt(2 / config.d_model) * mean + 0.05,
        "gradient ratio": (walk > 3 * _gradient_spread(config, prediction) * mean + 0.03).any(),
    }


def _misses(config: ModelConfig, prediction: Prediction, measured: Measured, seeds: int) -> set[str]:
    """The names of what lies outside its band anywhere; `measured` is a mean over that many seeds."""
    mean = 1 / math.sqrt(seeds)
    off = _signal_misses(config, prediction, measured, mean) | _gradient_misses(config, prediction, measured, mean)
    return {name for name, miss in off.items() if miss}


def _check(config: ModelConfig, seeds: tuple[int, ...], gradients: Gradients = "stream") -> None:
    measured = average([measure(config, seed, training=config.dropout > 0, gradients=gradients) for seed in seeds])
    assert _misses(config, _predict(config, measured), measured, len(seeds)) == set()


def _gradients(method: str) -> Gradients:
    """Those of all weights where other tests of the same models need them, who then share the measurement."""
    return "all" if method == "deepscalelm_pre" else "stream"


@pytest.mark.parametrize("method", [*METHODS, *PLACED_METHODS])
def test_twelve_layers(method):
    _check(resolved(method, 12, 256), (0,) if method == "sigma_reparam" else (0, 1))


@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_48_layers(method):
    _check(resolved(method, 48, 256), (0, 1), _gradients(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", PLACED_METHODS)
def test_48_layers_of_other_placements(method):
    _check(resolved(method, 48, 256), (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_192_layers(method):
    _check(resolved(method, 192, 256), (0,), _gradients(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["deepscalelm_pre", "magneto"])
def test_a_thousand_layers(method):
    _check(resolved(method, 1000, 64, "data.seq_len=64"), (0,))


@pytest.mark.parametrize(
    ("method", "n_layers", "overrides"),
    [
        ("deepscalelm_pre", 12, ("model.dropout=0.1",)),
        ("deepscalelm_pre", 12, ("model.activation=gelu", "model.attention.position=learned")),
        ("deepscalelm_pre", 12, ("deepscale.form=literal",)),
        ("sigma_reparam", 4, ("model.sigma.gamma=one",)),
        ("resi_dual", 6, ("model.dropout=0.1", "model.norm=rmsnorm")),
        ("skipinit", 12, ("model.skipinit.start=0.2", "model.bias=false")),
        ("admin", 12, ("model.dropout=0.1", "model.activation=relu")),
        ("gated_attention", 12, ()),
        ("deepscalelm_pre", 12, ("model.attention.gate=elementwise", "model.gate.start=0.3")),
        ("post_ln", 12, ("model.attention.softmax=sink", "model.attention.position=alibi")),
        ("softmax_one", 12, ()),
        ("shaped_attention", 12, ()),
        ("shaped_attention", 12, ("model.shaped.tau=0.1", "model.placement=pre")),
        ("sas", 12, ()),
        ("sas_p", 24, ("model.simplified.gain=0.3",)),
        ("wesar", 12, ()),
        ("scaled_embed", 12, ()),
        ("deepscalelm_pre", 12, ("model.attention.value_residual=true",)),
        ("dyt", 12, ("model.dyt.other_alpha=0.4", "model.dropout=0.1")),
        ("sigma_reparam_nonorm", 4, ()),
    ],
)
def test_variants(method, n_layers, overrides):
    _check(resolved(method, n_layers, 256, *overrides), (0,))


@pytest.mark.parametrize("method", ["deepnorm", "pre_ln"])
def test_fewer_key_value_heads_scatter_as_predicted(method):
    """8 query heads on 2 key/value heads: branches have the predicted mean, and layers differ as the theory says."""
    config, misses = resolved(method, 24, 128, "model.kv_heads=2", n_heads=8), []
    for seed in (0, 1):
        measured = measure(config, seed, gradients="none")
        prediction = _predict(config, measured)
        ratio = np.log(prediction.attention_branch_variance / measured.attention_branch_variance)[1:]
        misses.append(ratio / prediction.attention_branch_spread[1:])
    assert 0.5 < np.std(misses) < 1.4
    assert abs(np.mean(misses)) < 0.5


def test_branches_of_nearly_uncorrelated_tokens_have_the_predicted_size():
    """Repeated tokens make a tenth of DeepNorm's attention branches here (Zipf's law, 3 % of all pairs)."""
    config = resolved("deepnorm", 24, 256, n_heads=8)
    measured = measure(config, 0, gradients="none")
    ratio = (_predict(config, measured).attention_branch_variance / measured.attention_branch_variance)[1:]
    assert ratio.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n_layers", [12, 48, 192])
def test_sigma_reparametrisation_starts_as_its_plain_twin(n_layers):
    """gamma is sigma(W) at the start, so (gamma / sigma) W is W; measured in the models of 12 layers."""
    sigma, plain = (resolved(method, n_layers, 256) for method in ("sigma_reparam", "pre_ln"))
    ours, theirs = (vars(predict(config, seq_len=16)) for config in (sigma, plain))
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-12, err_msg=name)
    if n_layers == 12:
        one, other = measure(sigma, 0), measure(plain, 0)
        np.testing.assert_allclose(one.stream_variance, other.stream_variance, rtol=1e-4)
        np.testing.assert_allclose(one.gradient_norm, other.gradient_norm, rtol=1e-4)


def test_clipped_weights_have_no_prediction():
    """Which weights are clipped depends on the largest logits of each row."""
    found = predict(resolved("clipped_softmax", 4, 64), seq_len=16)
    assert all(np.isnan(values).all() for values in vars(found).values())


# What the bands see: wrong constants in the model, the right config in the prediction.


@pytest.mark.parametrize(
    ("overrides", "wrong", "caught"),
    [
        (("model.activation=gelu",), ("model.activation=relu",), "feedforward mean"),
        ((), ("deepscale.form=literal",), "attention"),
    ],
)
def test_weights_of_another_config_are_caught(overrides, wrong, caught):
    config, weights = (resolved("deepscalelm_pre", 12, 256, *keys) for keys in (overrides, wrong))
    measured = average([measure(config, seed, weights=weights) for seed in (0, 1)])
    assert caught in _misses(config, _predict(config, measured), measured, 2)


def test_a_wrong_branch_scale_is_caught():
    """beta^2 1/2 instead of 2 / n_layers: tokens grow alike at once, though the variances stay."""
    config, wrong = (resolved("deepscalelm_pre", 12, 256, f"deepscale.k={k}") for k in (2, 6))
    measured = average([measure(wrong, seed) for seed in (0, 1)])
    misses = _misses(config, _predict(config, measured), measured, 2)
    assert {"correlation", "gradient ratio"} <= misses and "stream" not in misses
