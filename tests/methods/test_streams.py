"""Streams of several tensors or with gates: parity with plain implementations, the start, caches, counts, theory."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import plain_streams as plain
from support.parity import assert_parity
from support.statistics import collision, resolved, zipf_tokens
from torch import Tensor

from stablelm.config.identity import differences, identity
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config, ModelConfig
from stablelm.methods.mhc import doubly_stochastic
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import decays, initialise, roles
from stablelm.observe.layer_hooks import Internals
from stablelm.probe.measure import measure
from stablelm.probe.predict import Prediction, predict

METHODS = ("hyper_connections", "mhc", "muddformer", "attention_residuals", "gtrxl")
SIZES = ("model.n_layers=3", "model.d_model=32", "model.n_heads=4", "data.seq_len=24", "train.steps=5")


def _whole(method: str, *overrides: str) -> Config:
    config = load([], [f"model.method={method}", *SIZES, *overrides]).config
    return resolve(config, pieces=200, world_size=1, accelerate_precision=None)


def _config(method: str, *overrides: str) -> ModelConfig:
    return _whole(method, *overrides).model


def _decoder(config: ModelConfig, precision: str = "fp64") -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, 0)
    return decoder


def _tokens(batch: int = 2, seq_len: int = 24) -> Tensor:
    return torch.randint(200, (batch, seq_len), generator=torch.Generator().manual_seed(0))


def _moved(decoder: Decoder) -> Decoder:
    """Every parameter away from its start, so that each of them matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            size = 0.2 if parameter.ndim == 1 else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return decoder


CASES = {
    "hyper": (plain.hyper_connections, ("hyper_connections",)),
    "hyper of two": (plain.hyper_connections, ("hyper_connections", "model.hyper_connections.expansion=2")),
    "static hyper": (plain.hyper_connections, ("hyper_connections", "model.hyper_connections.dynamic=false")),
    "mhc": (plain.mhc, ("mhc", "model.kv_heads=2")),
    "mudd": (plain.muddformer, ("muddformer",)),
    "mudd, grouped": (plain.muddformer, ("muddformer", "model.kv_heads=2", "model.norm=layernorm")),
    "static mudd": (plain.muddformer, ("muddformer", "model.muddformer.dynamic=false")),
    "attention": (plain.attention_residuals, ("attention_residuals",)),
    "attention of blocks": (
        partial(plain.attention_residuals, block=4),
        ("attention_residuals", "model.attention_residuals.block_size=4"),
    ),
    "attention of odd blocks": (
        partial(plain.attention_residuals, block=3),
        ("attention_residuals", "model.attention_residuals.block_size=3"),
    ),
    "gtrxl": (plain.gtrxl, ("gtrxl",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_decoder_equals_the_papers_equations_forward_and_backward(case: str, record_property):
    function, overrides = CASES[case]
    config = _config(*overrides)
    decoder = _moved(_decoder(config))
    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in decoder.named_parameters()}
    found, wanted = decoder(_tokens(2, 9)), function(w, config, _tokens(2, 9))
    back = torch.randn(found.shape, generator=torch.Generator().manual_seed(7), dtype=found.dtype)
    found.backward(back)
    wanted.backward(back)
    gradients = {name: (p.grad, w[name].grad) for name, p in decoder.named_parameters() if name != "head.weight"}
    # Mixing equal copies gives them again.
    idle = ("layers.0.attention.static_mix",) if case == "mhc" else ()
    assert_parity(record_property, overrides[0], (found, wanted), gradients, idle=idle)


def _residual(config: ModelConfig) -> ModelConfig:
    """The same model with a plain sum."""
    return dataclasses.replace(config, stream="residual")


@pytest.mark.parametrize(
    "overrides",
    [
        ("hyper_connections",),
        ("hyper_connections", "model.hyper_connections.dynamic=false", "model.placement=peri"),
        ("hyper_connections", "model.hyper_connections.expansion=1", "model.placement=none"),
        ("mhc",),
        ("mhc", "model.mhc.exchange=0.4", "model.mhc.expansion=3", "model.placement=post"),
        ("muddformer",),
        ("muddformer", "model.muddformer.dynamic=false", "model.placement=sub"),
    ],
    ids=" ".join,
)
def test_they_start_as_a_residual_stream(overrides: tuple[str, ...]):
    config = _config(*overrides)
    # Initial values are rounded to fp32.
    torch.testing.assert_close(_decoder(config)(_tokens()), _decoder(_residual(config))(_tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("block", "sources"), [(1, 7), (2, 4), (4, 3), (6, 2), (100, 2)])
def test_attention_residuals_start_as_means_of_their_sources(block: int, sources: int):
    """The sum of all outputs over their number, or that of blocks and the embedding."""
    config = _config("attention_residuals", f"model.attention_residuals.block_size={block}", "model.norm_eps=1e-12")
    assert _reached(_decoder(config)) == pytest.approx(_reached(_decoder(_residual(config))) / sources, rel=1e-6)


def _reached(decoder: Decoder) -> float:
    """The length of the stream at its end."""
    last: list[Tensor] = []
    decoder.tap = lambda _, chunks: (last.append(decoder.stream.finish(chunks)), chunks)[1]
    decoder(_tokens())
    return last[-1].norm().item()


def test_gates_start_nearly_closed():
    decoder = _decoder(_config("gtrxl", "model.gtrxl.gate_bias=20"))
    plain_start = decoder.finish((decoder.embed(_tokens()),))
    torch.testing.assert_close(decoder(_tokens()), plain_start, rtol=0, atol=1e-6)


def test_sinkhorn_knopp_gives_doubly_stochastic_matrices_and_their_gradients():
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    found = doubly_stochastic(logits, 200)
    assert found.min() > 0
    for dim in (-1, -2):
        torch.testing.assert_close(found.sum(dim), torch.ones(2, 4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.linalg.matrix_norm(found, ord=2).max() <= 1 + 1e-9
    assert torch.autograd.gradcheck(lambda x: doubly_stochastic(x, 20), (logits,))
    wide = torch.tensor([[300.0, 0.0], [0.0, -300.0]])
    assert doubly_stochastic(wide, 20).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_gives_what_the_whole_sequence_gives(method: str):
    config = _config(method)
    decoder = _moved(_decoder(config, "fp64")).eval()
    cache = KeyValueCache(config, 2)
    with torch.no_grad():
        found = torch.cat([decoder(piece, cache=cache) for piece in _tokens().split([5, 1, 18], dim=1)], dim=1)
        torch.testing.assert_close(found, decoder(_tokens()), rtol=1e-9, atol=1e-9)
        whole = decoder(_tokens())
        for layer in decoder.layers:
            layer.attention.fix()  # type: ignore[union-attr]
            layer.feedforward.fix()  # type: ignore[union-attr]
        torch.testing.assert_close(decoder(_tokens()), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_maps_decay_and_count_as_matrices_and_vectors_do_not(method: str):
    config = _config(method)
    decoder = Decoder(config, "fp32")
    found = roles(decoder)
    counts, twin = parameter_counts(config), parameter_counts(_residual(config))
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    assert counts["total"] == sum(sizes.values())
    maps = [name for name, role in found.items() if role.added_map]
    assert all(decays(found[name]) for name in maps)
    assert all(decoder.get_parameter(name).ndim == 2 for name in maps)
    assert counts["matmul"] - twin["matmul"] == sum(sizes[name] for name in maps)
    others = [name for name, role in found.items() if name not in maps and decays(role)]
    assert all(".weight" in name for name in others)


def test_operations_of_gates_are_counted():
    """Six matrices of d_model^2 for each sub-layer, six operations for each entry; copies are also read and mixed."""
    more = {}
    for method in ("gtrxl", "hyper_connections"):
        config = _config(method)
        more[method] = flops_per_token(config, 24) - flops_per_token(_residual(config), 24)
    assert more["gtrxl"] == 6 * (6 * 32**2) * 2 * 3
    assert more["hyper_connections"] == 6 * 32 * (4 + 16 + 4 * 6) * 2 * 3


@pytest.mark.parametrize("method", ["pre_ln", *METHODS])
def test_runs_saved_before_the_options_existed_have_their_defaults(method: str):
    current = identity(_whole(method), base_names=["a"], tokenizer_sha256="0")
    sections = tuple(f"model.{name}." for name in METHODS)
    saved = {key: value for key, value in current.items() if not key.startswith(sections)}
    assert len(saved) <= len(current) - 9
    assert differences(saved, current) == []


# Theory.


def _measured(config: ModelConfig, folder: Path) -> tuple[Internals, float]:
    rows = torch.randint(200, (2, 65), generator=torch.Generator().manual_seed(1))
    same = (rows[:, :-1, None] == rows[:, None, :-1]).double().sum(dim=(1, 2)).mean().item()
    found = measure(config, rows[:, :-1], rows[:, 1:].contiguous(), precision="fp64", seed=0, pieces=200, folder=folder)
    return found.internals, (same - 64) / (64 * 63)


@pytest.mark.parametrize("method", ["hyper_connections", "mhc", "muddformer"])
def test_signal_and_gradient_at_the_start_are_those_of_the_residual_stream(method: str, tmp_path: Path):
    """So is what is predicted; the gradient to a copy alone would be a part of it."""
    config = _config(method, "data.seq_len=64")
    found, twin = (_measured(each, tmp_path)[0] for each in (config, _residual(config)))
    for name in dataclasses.asdict(twin):
        if name != "weight_gradient_norm":  # the stream has matrices, too
            np.testing.assert_allclose(getattr(found, name), getattr(twin, name), rtol=1e-6, err_msg=name)
    predicted, expected = (predict(each, seq_len=64) for each in (config, _residual(config)))
    for name, column in dataclasses.asdict(expected).items():
        np.testing.assert_array_equal(getattr(predicted, name), column, err_msg=name)


def _zipf(config: ModelConfig, seed: int, folder: Path) -> tuple[Internals, Prediction]:
    assert config.max_seq_len is not None
    rows = zipf_tokens(2, config.max_seq_len + 1, seed)
    tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
    found = measure(config, tokens, targets, precision="fp32", seed=seed, pieces=4096, folder=folder).internals
    return found, predict(config, seq_len=config.max_seq_len, tokens=tokens.numel(), collision=collision(tokens))


def _ratios(config: ModelConfig, folder: Path, seeds: int) -> dict[str, np.ndarray]:
    """Predicted over measured at every layer, a geometric mean over seeds."""
    names = ("stream_variance", "attention_branch_variance", "feedforward_branch_variance", "gradient_norm")
    logs: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for seed in range(seeds):
        found, predicted = _zipf(config, seed, folder)
        for name in names:
            first = int("branch" in name)
            logs[name].append(np.log(getattr(predicted, name)[first:] / getattr(found, name)[first:]))
        np.testing.assert_allclose(predicted.token_correlation, found.token_correlation, atol=0.15)
    return {name: np.exp(np.mean(each, axis=0)) for name, each in logs.items()}


def _within(ratios: dict[str, np.ndarray]) -> None:
    for name, ratio in ratios.items():
        # Near collapse the gradient scatters.
        low, high = {"stream_variance": (0.7, 1.4), "gradient_norm": (0.5, 2.0)}.get(name, (0.6, 1.6))
        if name != "gradient_norm" or not np.isnan(ratio).all():  # none where tokens have collapsed
            assert low < ratio.min() and ratio.max() < high, (name, ratio)


DERIVED = [
    ("attention_residuals",),
    ("attention_residuals", "model.attention_residuals.block_size=3"),
    ("gtrxl",),
    ("gtrxl", "model.gtrxl.gate_bias=0", "model.dropout=0.1", "model.placement=peri"),
]


@pytest.mark.parametrize("overrides", DERIVED, ids=" ".join)
def test_means_and_gates_are_as_predicted(overrides: tuple[str, ...], tmp_path: Path):
    method, *more = overrides
    _within(_ratios(resolved(method, 6, 128, "data.seq_len=48", *more), tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", [24, 48])
@pytest.mark.parametrize("method", METHODS)
def test_deep_streams_are_as_predicted(method: str, n_layers: int, tmp_path: Path):
    grouped = ("model.activation=swiglu", "model.norm=rmsnorm", "model.kv_heads=2") if n_layers == 24 else ()
    _within(_ratios(resolved(method, n_layers, 256, *grouped, n_heads=8), tmp_path, 2))
