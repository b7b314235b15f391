"""The walk layer by layer against a whole Decoder: the same figures, with the memory of one layer."""

import dataclasses
import gc
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Stream
from stablelm.methods.catalogue import METHODS
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.observe.layer_hooks import Internals, internals, norm
from stablelm.observe.layers import Recorder
from stablelm.probe import measure as module
from stablelm.probe.changes import FirstUpdate
from stablelm.probe.measure import Measured, boundary_seed, measure
from stablelm.probe.predict import predict, predict_sensitivity
from stablelm.seeds import seed_from

SEED = 3


@lru_cache
def model(*overrides: str) -> ModelConfig:
    tiny = ["model.n_layers=3", "model.d_model=32", "model.n_heads=4", "train.steps=5", "data.seq_len=12"]
    return resolve(load([], [*tiny, *overrides]).config, pieces=90, world_size=1, accelerate_precision=None).model


def text() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, 90, (2, 13), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:].contiguous()


def walked(config: ModelConfig, folder: Path, **options) -> Measured:
    return measure(config, *text(), precision="fp64", seed=SEED, pieces=90, folder=folder, **options)


def whole(config: ModelConfig, z_loss: float = 0.0) -> tuple[Internals, float]:
    """All layers at once, the generator started anew at each boundary."""
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, SEED)
    tokens, targets = text()
    with Recorder(decoder) as recorder:
        tap = decoder.tap
        assert tap is not None

        def seeded(index, chunks):
            torch.manual_seed(boundary_seed(SEED, index))
            return tap(index, chunks)

        decoder.tap = seeded
        torch.manual_seed(boundary_seed(SEED, -1))
        sums = decoder(tokens, targets, z_loss)
        (sums.total / sums.valid).backward()
    matrices = [
        [p for p in layer.parameters() if p.ndim == 2]
        for layer in (decoder.layers[number] for number in decoder.places)
    ]
    weights = [norm(p.grad for p in group if p.grad is not None) for group in ([decoder.embedding.weight], *matrices)]
    return internals(recorder.rows(), recorder.gradients, weights), float(sums.cross_entropy / sums.valid)


def assert_equal(found: Internals, expected: Internals) -> None:
    for name, column in dataclasses.asdict(expected).items():
        assert np.isfinite(column).all(), name
        np.testing.assert_allclose(getattr(found, name), column, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_whole_decoder(method: str, tmp_path: Path):
    config = model(f"model.method={method}")
    found, (expected, loss) = walked(config, tmp_path), whole(config)
    assert_equal(found.internals, expected)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert len(found.internals.gradient_norm) == config.n_layers + 1
    assert found.internals.gradient_norm.min() > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.method=deepscalelm_post", "model.dropout=0.2", "model.attention.position=learned"),
        ("model.method=catformer", "model.dropout=0.1", "model.tie_embeddings=true", "model.embedding_norm=true"),
        ("model.method=denseformer", "model.dropout=0.1", "model.attention.position=alibi", "model.kv_heads=2"),
        ("model.method=value_residual", "model.dropout=0.1", "model.n_layers=1"),
        ("model.method=value_residual", "model.stream=concat", "model.init=unit", "model.activation=swiglu"),
        ("model.method=value_residual", "model.value_residual.learned=true", "model.kv_heads=2"),
        ("model.method=denseformer", "model.denseformer.period=2", "model.denseformer.dilation=2"),
        ("model.method=dyt", "model.dropout=0.1", "model.tie_embeddings=true", "model.placement=peri"),
        ("model.method=magneto", "model.tie_embeddings=true", "model.norm=dyt", "model.attention.logit_cap=2.0"),
    ],
    ids=lambda overrides: overrides[0].split("=")[1] + "-" + overrides[1].rpartition(".")[2],
)
def test_combinations_and_dropout_equal_the_whole_decoder(overrides: tuple[str, ...], tmp_path: Path):
    config = model(*overrides)
    found, (expected, loss) = walked(config, tmp_path, z_loss=1e-3), whole(config, z_loss=1e-3)
    assert_equal(found.internals, expected)
    assert found.loss == pytest.approx(loss, rel=1e-12)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = model("model.n_layers=6", "model.method=magneto_sigma")
    live: list[int] = []
    original = module.LayerGauge
    gc.collect()

    def count() -> None:
        (decoder,) = (thing for thing in gc.get_objects() if isinstance(thing, Decoder) and thing.config is config)
        live.append(sum(p.numel() for p in decoder.layers.parameters() if not p.is_meta))

    def gauge(layer):
        count()
        return original(layer)

    monkeypatch.setattr(module, "LayerGauge", gauge)
    walked(config, tmp_path, on_layer=count)
    one = sum(p.numel() for p in Decoder(config, "fp64").layers[0].parameters())
    assert live == [one, 0] * 6 + [0] * 6


def test_the_spectral_norms_are_those_of_the_weights(tmp_path: Path):
    config = model("model.method=magneto_sigma")
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, SEED)
    found = walked(config, tmp_path).sigma
    assert len(found) == 3 * 6
    for name, value in found.items():
        weight = decoder.get_parameter(f"{name}.weight").detach()
        assert value == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-6)


def test_the_generator_is_left_alone_and_the_file_goes_on_errors(tmp_path: Path):
    config = model("model.dropout=0.1")
    state = torch.get_rng_state()

    def fail() -> None:
        assert list(tmp_path.iterdir()) == []  # the file has no name even while it is used
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        walked(config, tmp_path, on_layer=fail)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


SHARED = ("model.method=looped", "model.n_layers=4", "model.shared.repeats=2")


@pytest.mark.parametrize("overrides", [("model.method=value_residual", "model.tie_embeddings=true"), SHARED])
def test_sensitivity_and_growth_equal_the_whole_decoder(overrides: tuple[str, ...], tmp_path: Path):
    """By changing all weights at once; dropout draws the same masks in every pass."""
    config = model(*overrides, "model.dropout=0.1")
    update = FirstUpdate(config, rate=0.01, eps=1e-8)
    found = walked(config, tmp_path, update=update)
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, SEED)
    before = outputs(decoder)
    loss = decoder_loss(decoder)
    loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    start = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    other = Decoder(config, "fp64")
    initialise(other, config, seed_from("sensitivity", SEED))
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.startswith("layers.") and p.ndim == 2:
                p.add_(1e-3 * other.get_parameter(name))
    moved = outputs(decoder)
    expected = float((moved[0] - before[0]).square().sum() / before[0].square().sum()) * 1e6
    assert found.sensitivity == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            g = gradients[name]
            p.copy_(start[name] - 0.01 * (g / (g.abs() + 1e-8)).half().double())
    state, hidden = outputs(decoder)
    assert found.growth is not None
    change = float((hidden - before[1]).norm() / before[1].norm())
    assert found.growth.output_change == pytest.approx(change, rel=1e-6)
    assert found.growth.stream_variance == pytest.approx(
        float(state.square().mean() / before[0].square().mean()), rel=1e-6
    )
    assert found.growth.loss == pytest.approx(decoder_loss(decoder).item(), rel=1e-6)
    assert found.growth.loss < found.loss


def decoder_loss(decoder: Decoder) -> Tensor:
    """Of a pass whose generator starts anew at each boundary."""
    tokens, targets = text()
    decoder.tap = reseeded
    torch.manual_seed(boundary_seed(SEED, -1))
    sums = decoder(tokens, targets)
    return sums.total / sums.valid


def reseeded(index: int, chunks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(boundary_seed(SEED, index))
    return chunks


@torch.no_grad()
def outputs(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """The stream at the end and what the head sees."""
    last: list[Tensor] = []

    def tap(index: int, chunks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if index == decoder.config.n_layers:
            last.append(torch.cat(decoder.stream.state(chunks), -1).clone())
        return reseeded(index, chunks)

    decoder.tap = tap
    torch.manual_seed(boundary_seed(SEED, -1))
    hidden = decoder(text()[0])
    return last[0], hidden


def test_the_update_follows_rates_and_epsilon_of_roles():
    config = model("model.method=completep", "model.completep.base_width=8", "model.completep.base_depth=1")
    update = FirstUpdate(config, rate=0.5, eps=1.0)
    gradient = torch.tensor([[2.0, -1.0, 0.0]])
    rates = config.axes.init.rates(config, in_layer=True, matrix=True)
    expected = -rates.lr * gradient / (gradient.abs() + rates.eps)
    assert torch.equal(update.direction("layers.0.attention.body.query.weight", gradient), expected.half())
    assert torch.equal(update.direction("head.weight", gradient), (-gradient / (gradient.abs() + 1)).half())


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("pre_ln", 0.7, 1.6),
        ("post_ln", 0.4, 2.6),
        ("deepscalelm_pre", 0.7, 1.6),
        ("deepnorm", 0.7, 1.6),
        ("catformer", 0.7, 2.0),
        ("rezero", 1.0, 1.0),
        ("mlra", 0.7, 1.4),
        ("denseformer", 0.7, 1.4),
        ("gpt2", 0.7, 1.4),
        ("stochastic_depth", 0.7, 1.6),
        ("e_spa_skips", 0.7, 1.6),
        ("gtrxl", 0.6, 1.6),
        ("sas", 0.9, 1.1),
        ("sas_p", 0.9, 1.1),
        ("resi_dual", 0.4, 2.6),
    ],
)
def test_sensitivity_beside_the_theory(method: str, low: float, high: float, tmp_path: Path):
    """Measured / predicted; in post_ln what a change does to later branches adds up (docs/theory.md)."""
    config = model(f"model.method={method}", "model.n_layers=8", "model.d_model=64", "data.seq_len=64")
    rows = torch.randint(0, 90, (2, 65), generator=torch.Generator().manual_seed(1))
    update = FirstUpdate(config, rate=0.01, eps=1e-8)
    tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
    options = {"precision": "fp32", "seed": SEED, "pieces": 90, "folder": tmp_path, "update": update}
    found = measure(config, tokens, targets, **options).sensitivity
    predicted, reason = predict_sensitivity(config, predict(config, seq_len=64, tokens=128, collision=1 / 90), 64)
    assert predicted is not None and found is not None and reason is None
    if method == "rezero":
        assert (found, predicted) == (0.0, 0.0)
    else:
        assert low <= found / predicted <= high


def test_a_stream_without_a_theory_says_so():
    class Unknown(Stream):
        name = "unknown"
        predicted = False

    config = model("model.method=pre_ln")
    prediction = predict(config, seq_len=12)
    axes = dataclasses.replace(config.axes, stream=Unknown())
    unknown = SimpleNamespace(axes=axes, n_layers=0, attention=config.attention)
    found = predict_sensitivity(cast(ModelConfig, unknown), prediction, 12)
    assert found == (None, "the theory does not know what a branch contributes to model.stream=unknown")
    dyt = model("model.norm=dyt")
    value, reason = predict_sensitivity(dyt, predict(dyt, seq_len=12), 12)
    assert value is None
    assert reason is not None and "model.norm=dyt does not" in reason
