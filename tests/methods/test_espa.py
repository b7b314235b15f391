"""E-SPA: the shaped attention against Cholesky factors, the network it makes, and the tailored activation."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.methods import e_spa as espa
from stablelm.methods.sizes import widths
from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions
from stablelm.model.decoder import Decoder
from stablelm.model.feedforward import FeedForward
from stablelm.model.initialise import initialise
from stablelm.model.linear import make_dtypes
from stablelm.model.sublayer import Layer

N_LAYERS, SEQ_LEN, D_MODEL = 36, 128, 256


def _config(*overrides: str) -> ModelConfig:
    config = load([], ["model.method=e_spa", "model.n_heads=4", "train.steps=5", *overrides]).config
    return resolve(config, pieces=500, world_size=1, accelerate_precision=None).model


def _kernel(layer: int, n_layers: int, seq_len: int) -> np.ndarray:
    """exp(-gamma |i - j|) after `layer` layers; the identity before the first."""
    if layer == 0:
        return np.eye(seq_len)
    distance = np.abs(np.subtract.outer(np.arange(seq_len), np.arange(seq_len)))
    return np.exp(-espa.decay(layer, n_layers) * distance)


def _attention(layer: int, n_layers: int, seq_len: int) -> np.ndarray:
    """D_l softmax(B_l): what zero queries make of the bias and the scale."""
    bias, rows = espa.bias_and_scale(layer, n_layers, seq_len)
    weights = np.exp(bias)
    return rows[:, None] * weights / weights.sum(axis=1, keepdims=True)


def test_the_decay_falls_to_its_end_and_keeps_the_diagonal():
    gammas = [espa.decay(layer, N_LAYERS) for layer in range(1, N_LAYERS + 1)]
    assert gammas[-1] == pytest.approx(0.005, rel=1e-12)
    assert all(after < before for before, after in pairwise(gammas))
    for layer in (0, 1, 20, 35):
        diagonal = np.diagonal(_attention(layer, N_LAYERS, 40))
        assert diagonal[0] == pytest.approx(1, abs=1e-12)
        assert diagonal[1:] == pytest.approx(0.93798, abs=1e-5)


@pytest.mark.parametrize("n_layers", [4, 36])
def test_attention_is_the_quotient_of_cholesky_factors(n_layers):
    factors = [np.linalg.cholesky(_kernel(layer, n_layers, 64)) for layer in range(n_layers + 1)]
    for layer in range(n_layers):
        found = _attention(layer, n_layers, 64)
        assert np.abs(found - factors[layer + 1] @ np.linalg.inv(factors[layer])).max() < 1e-9
        assert found.min() >= 0
        assert not np.triu(found, 1).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)])
@pytest.mark.parametrize(("n_layers", "seq_len"), [(36, 128), (1000, 32)])
def test_the_product_over_depth_makes_the_last_kernel(n_layers, seq_len, dtype, tolerance):
    product = np.eye(seq_len, dtype=dtype)
    for layer in range(n_layers):
        product = _attention(layer, n_layers, seq_len).astype(dtype) @ product
    assert np.abs(product @ product.T - _kernel(n_layers, n_layers, seq_len)).max() < tolerance


@pytest.mark.parametrize("layer", [0, 17, 35])
def test_long_sequences_have_no_infinite_bias_below_the_diagonal(layer):
    seq_len = 1024
    bias, rows = espa.bias_and_scale(layer, N_LAYERS, seq_len)
    assert np.isfinite(bias[np.tril_indices(seq_len)]).all()
    assert np.isneginf(bias[np.triu_indices(seq_len, 1)]).all()
    single = torch.from_numpy(bias).float().softmax(dim=-1).double().numpy() * rows[:, None]
    assert np.abs(single - np.exp(espa.log_attention(layer, N_LAYERS, seq_len))).max() < 1e-6


def test_row_sums_at_known_layers():
    sums = [espa.bias_and_scale(layer, N_LAYERS, 64)[1].max() for layer in (0, 17, 35)]
    assert sums == pytest.approx([1.436, 1.068, 1.018], abs=1e-3)


def _decoder(config: ModelConfig, precision: str, seed: int = 0) -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, seed)
    return decoder


@pytest.mark.parametrize("logit_cap", [0.0, 30.0])
def test_attention_at_the_start_does_not_see_its_input(logit_cap):
    config = _config(
        "model.n_layers=4", "model.d_model=32", "data.seq_len=24", f"model.attention.logit_cap={logit_cap}"
    )
    decoder = _decoder(config, "fp64")
    attention = decoder.get_submodule("layers.2.attention.body")
    assert isinstance(attention, Attention)
    assert not decoder.get_parameter("layers.2.attention.body.query.weight").any()
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
    assert attention.output is not None
    wanted = torch.from_numpy(_attention(2, 4, 24)) @ value @ attention.output.weight.T
    for _ in range(2):
        x = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
        both = torch.cat((attention.query(x), attention.key(x)), dim=-1)
        found = attention((both, value), Positions())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# A deep stack of attention alone, as the theory has it.


def _attention_alone(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """The stream after the embedding and after each attention sub-layer, feed-forward ones left out."""
    chunks = decoder.stream.start(decoder.embed(tokens))
    found = [chunks[0]]
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        chunks = layer.attention.leave(chunks, layer.attention.enter(chunks), Positions())
        found.append(chunks[0])
    return found


def test_a_stack_without_skips_keeps_the_size_of_tokens_and_their_planned_correlation():
    sizes = (f"model.n_layers={N_LAYERS}", f"model.d_model={D_MODEL}", f"data.seq_len={SEQ_LEN}", "model.d_ff=8")
    config = replace(_config(*sizes), vocab_size=SEQ_LEN)
    decoder = _decoder(config, "fp32")
    with torch.no_grad():
        stream = _attention_alone(decoder, torch.randperm(SEQ_LEN, generator=torch.Generator().manual_seed(0))[None])
    assert len(stream) == N_LAYERS + 1
    for layer in (1, 9, 18, 27, 36):
        x = stream[layer][0].double()
        kernel = (x @ x.T / D_MODEL).numpy()
        pairs = np.tril_indices(SEQ_LEN, -1)
        sizes_ = np.sqrt(np.diagonal(kernel))
        correlation = (kernel / np.outer(sizes_, sizes_))[pairs].mean()
        assert correlation == pytest.approx(_kernel(layer, N_LAYERS, SEQ_LEN)[pairs].mean(), abs=0.03)
        assert 0.9 <= np.diagonal(kernel).mean() <= 1.05


# The tailored activation.


@pytest.mark.parametrize(("activations", "slope"), [(18, 0.1461), (36, 0.3511), (72, 0.5084), (192, 0.6739)])
def test_slope_of_a_known_depth(activations, slope):
    found = espa.tailored_slope(activations)
    assert found == pytest.approx(slope, abs=5e-4)
    assert espa.composed_correlation(found, activations) == pytest.approx(0.9, abs=1e-9)


def test_few_activations_cannot_reach_the_correlation():
    assert espa.composed_correlation(0.0, 12) < 0.9 < espa.composed_correlation(0.0, 13)
    assert espa.tailored_slope(12) == 0
    assert espa.tailored_slope(13) > 0


@pytest.mark.parametrize("n_layers", [8, 36, 192])
def test_the_activation_keeps_the_second_moment_and_maps_correlation_as_composed(n_layers):
    config = _config(f"model.n_layers={n_layers}", "model.d_model=32", "model.d_ff=2", "data.seq_len=8")
    body = FeedForward(config, make_dtypes("fp64", "fp32"), widths(config, 1), 1)
    slope = espa.tailored_slope(n_layers)
    with torch.no_grad():
        body.fc2.weight.copy_(torch.eye(32, 2))
        x = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = torch.stack((x[:, 0], 0.3 * x[:, 0] + math.sqrt(1 - 0.09) * x[:, 1]), dim=1)
        y = body((x,))[:, :2]
    assert y.square().mean().item() == pytest.approx(1, rel=0.01)
    weight = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    wanted = 0.3 + weight * (math.sqrt(1 - 0.09) - 0.3 * math.acos(0.3))
    assert (y[:, 0] * y[:, 1]).mean().item() == pytest.approx(wanted, abs=0.005)
