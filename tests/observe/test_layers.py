"""Figures of every layer: against brute force, on every engine, and without a trace in the training."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from support.measured import PIECES, SINGLE, configured, engine_of, text
from support.programs import TINY, losses, run
from torch import Tensor, nn

from stablelm.config.load import load
from stablelm.engine.interface import build_engine
from stablelm.engine.launch_environment import AccelerateFlags, Launch
from stablelm.engine.ranks import Ranks
from stablelm.model.attention.body import Attention
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.sublayer import Layer
from stablelm.observe import layer_hooks
from stablelm.observe.layer_hooks import (
    Internals,
    LayerGauge,
    angular_distance,
    kurtosis,
    mean_square,
    norm,
    token_correlation,
)
from stablelm.observe.layers import LayerObserver, Recorder, measure, rows_for, sigma_name
from stablelm.observe.sinks import last_records
from stablelm.train.job import build_loader, layers_batch
from stablelm.train.prepare import prepare
from stablelm.train.step import train_step

NAME = "layer/0003/grad_norm"


def decoder_of(*overrides: str) -> Decoder:
    config = configured(*overrides)
    decoder = Decoder(config.model, "fp64")
    initialise(decoder, config.model, 0)
    return decoder


def layer_of(decoder: nn.Module, index: int) -> Layer:
    layer = decoder.get_submodule(f"layers.{index}")
    assert isinstance(layer, Layer)
    return layer


def test_token_correlation_is_the_mean_cosine_of_pairs():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.3
    cosines = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    pairs = cosines[:, ~torch.eye(7, dtype=torch.bool)]
    assert float(token_correlation(x)) == pytest.approx(float(pairs.mean()), rel=1e-5)
    assert float(token_correlation(x[:, :1].expand(3, 4, 5))) == pytest.approx(1, abs=1e-6)
    assert math.isnan(float(token_correlation(x[:, :1])))


def test_squares_of_the_smallest_floats_do_not_vanish():
    tiny = torch.full((4, 25), 1e-30)
    assert float(norm((tiny, tiny))) == pytest.approx(1e-30 * math.sqrt(200))
    assert float(mean_square(tiny)) == pytest.approx(1e-60)


def test_kurtosis_is_one_for_equal_features_and_the_width_for_one_outlier():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    rms = x.double().square().mean(dim=(0, 1)).sqrt()
    assert float(kurtosis(x)) == pytest.approx(float((rms**4).mean() / (rms**2).mean() ** 2), rel=1e-6)
    assert float(kurtosis(torch.ones(2, 3, 8))) == pytest.approx(1)
    assert float(kurtosis(torch.eye(8)[3].expand(2, 3, 8))) == pytest.approx(8)


def test_angular_distance():
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    turned = torch.stack([-x[..., 1], x[..., 0], x[..., 2] * 0, x[..., 3] * 0], dim=-1)
    flat = torch.cat([x[..., :2], torch.zeros(2, 7, 2)], dim=-1)
    assert float(angular_distance(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert float(angular_distance(x, -x)) == pytest.approx(1, abs=1e-6)
    assert float(angular_distance(flat, turned)) == pytest.approx(0.5)
    # A stream that grows: the old features and as much again that is new.
    assert float(angular_distance(x, torch.cat([x, x], dim=-1))) == pytest.approx(0.25)


ATTENTIONS = [
    ("model.attention.position=rope", "model.kv_heads=2"),
    ("model.attention.position=alibi", "model.attention.logit_cap=1.5"),
    ("model.method=e_spa",),
    ("model.attention.qk_norm=true", "model.attention.position=learned"),
    ("model.attention.softmax=sink", "model.attention.position=alibi"),
    ("model.attention.softmax=off_by_one", "model.kv_heads=2"),
    ("model.attention.softmax=clipped", "model.clipped.alpha=1"),
]


@pytest.mark.parametrize("at_once", [2**20, 150, 1])
@pytest.mark.parametrize("overrides", ATTENTIONS, ids=lambda overrides: overrides[0].split("=")[1])
def test_attention_figures(overrides: tuple[str, ...], at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Over whole batches, some heads at a time, or one: the figures of all weights at once."""
    monkeypatch.setattr(layer_hooks, "LOGITS", at_once)
    decoder, (tokens, _) = decoder_of(*overrides), text()
    positions = decoder.positions(tokens)
    chunks = decoder.stream.start(decoder.embed(tokens))
    layer = layer_of(decoder, 0)
    attention = layer.attention.body
    assert isinstance(attention, Attention)
    _, products = layer.attention.enter(chunks)
    found = layer_hooks.attention_figures(attention, products, positions)
    logits = attention.logits(*attention.queries_and_keys(products, positions), positions)
    entropies, sinks, largest = [], [], 0.0
    for row in range(12):
        seen = logits[:, :, row, : row + 1]
        weights = seen.detach().softmax(-1)
        if "sink" in overrides[0] or "off_by_one" in overrides[0]:  # which start with a logit of 0
            weights = seen.detach().exp() / (1 + seen.detach().exp().sum(-1, keepdim=True))
        if "clipped" in overrides[0]:
            weights = ((1 + 1 / 12) * weights - 1 / 12).clamp(0, 1)
        entropies.append(torch.special.entr(weights).sum(-1))
        sinks.append(weights[..., 0])
        largest = max(largest, float(seen.detach().abs().max()))
    assert found["attention_entropy"].item() == pytest.approx(float(torch.stack(entropies).mean().detach()), rel=1e-9)
    assert found["attention_sink"].item() == pytest.approx(float(torch.stack(sinks).mean()), rel=1e-9)
    assert found["logit_max"].item() == pytest.approx(largest, rel=1e-12)
    assert largest > 0


@pytest.mark.parametrize("method", ["pre_ln", "catformer", "denseformer", "value_residual"])
def test_figures_of_a_whole_decoder(method: str):
    """The gradient by cutting the model in two, the branches by what they add to the stream."""
    decoder, (tokens, targets) = decoder_of(f"model.method={method}"), text()
    with Recorder(decoder) as recorder:
        sums = decoder(tokens, targets)
        (sums.total / sums.valid).backward()
    rows, gradients = recorder.rows(), recorder.gradients
    seen: dict[int, tuple[Tensor, ...]] = {}
    cut = 2

    def tap(index: int, chunks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if index == cut:
            chunks = tuple(chunk.detach().requires_grad_() for chunk in chunks)
        seen[index] = chunks
        return chunks

    decoder.tap = tap
    sums = decoder(tokens, targets)
    measured = seen[cut] if method == "catformer" else seen[cut][:1]
    expected = torch.autograd.grad(sums.total / sums.valid, measured)
    assert float(gradients[cut]) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-9)
    x = torch.cat(seen[cut], -1) if method == "catformer" else seen[cut][0]
    before = torch.cat(seen[cut - 1], -1) if method == "catformer" else seen[cut - 1][0]
    assert float(rows[cut]["angular_distance"]) == pytest.approx(float(angular_distance(before.detach(), x.detach())))
    assert float(rows[cut]["kurtosis"]) == pytest.approx(float(kurtosis(x.detach())), rel=1e-9)
    assert float(rows[0]["angular_distance"]) == 0
    assert float(rows[cut]["stream_variance"]) == pytest.approx(float(x.square().mean()), rel=1e-9)
    if method == "pre_ln":
        branches = seen[2][0] - seen[1][0]  # of attention and feed-forward together
        layer, positions = layer_of(decoder, 1), decoder.positions(tokens)
        attended = layer.attention.leave(seen[1], layer.attention.enter(seen[1])[1], positions)[0] - seen[1][0]
        assert float(rows[2]["attention_branch_variance"]) == pytest.approx(float(attended.square().mean()), rel=1e-9)
        fed = float((branches - attended).square().mean())
        assert float(rows[2]["feedforward_branch_variance"]) == pytest.approx(fed, rel=1e-9)
    decoder.tap = None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())


def assert_close(found: Internals, expected: Internals, tolerance: float = 1e-9) -> None:
    for name, column in dataclasses.asdict(expected).items():
        assert np.isfinite(column).all(), name
        np.testing.assert_allclose(getattr(found, name), column, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("method", ["magneto_sigma", "catformer", "value_residual"])
def test_recompute_counts_once(method: str):
    plain, again = engine_of(f"model.method={method}"), engine_of(f"model.method={method}", "engine.recompute=full")
    assert_close(measure(again, SINGLE, *text()), measure(plain, SINGLE, *text()))


def test_dropout_is_off_and_nothing_changes():
    engine = engine_of("model.method=magneto_sigma", "model.dropout=0.3")
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    generator = torch.get_rng_state()
    found = measure(engine, SINGLE, *text())
    assert_close(measure(engine, SINGLE, *text()), found, 0)
    assert_close(found, measure(engine_of("model.method=magneto_sigma"), SINGLE, *text()), 0.5)  # same size, no more
    assert torch.equal(torch.get_rng_state(), generator)
    assert engine.module.training
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    after = engine.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["pre_ln", "catformer"])
def test_compiled_layers_are_measured_and_stay_compiled(method: str):
    torch.compiler.reset()
    name, graphs = f"model.method={method}", torch._dynamo.utils.counters["stats"]
    engine, (tokens, targets) = engine_of(name), text()
    for index in range(3):  # what is compiled in training, by a backend that needs no compiler
        layer = layer_of(engine.module, index)
        for part in (layer.attention.body, layer.feedforward.body) if method == "catformer" else (layer,):
            part.compile(backend="aot_eager")

    def trained() -> Tensor:
        total = engine.loss(tokens, targets).total
        engine.backward(total, last=True)
        engine.clear_gradients()
        return total

    before = trained()
    made = graphs["unique_graphs"]
    assert made > 0
    assert_close(measure(engine, SINGLE, tokens, targets), measure(engine_of(name), SINGLE, tokens, targets))
    assert graphs["unique_graphs"] == made
    assert torch.equal(trained(), before)
    assert graphs["unique_graphs"] == made


def observed(kind: str, ranks: Ranks, precision: str = "fp64") -> dict[str, float]:
    """One record of the engine, made of all that an observer gathers."""
    engine = build_engine(configured("model.method=magneto_sigma", f"train.precision={precision}"), kind, ranks)
    records: list[dict] = []
    observer = LayerObserver(
        engine, ranks, every=4, sharpness_every=2, batch=text, pieces=PIECES, record=records.append
    )
    tokens, targets = text()
    for step in (2, 3, 4):
        observer.before(step)
        rows = slice(ranks.rank, None, ranks.world_size) if ranks.world_size <= 2 else slice(ranks.rank % 2, None, 2)
        own = tokens[rows], targets[rows]
        train_step(engine, ranks, *own, step=step, lr=1e-3, seed=0, micro=2)
        observer.step(step, 25 * step)
    first, last = records
    assert first.keys() == {"step", "tokens", "sharpness", "layers_seconds"}
    return last


def observed_on_rank(rank: int, world_size: int, kinds: list[str], precision: str) -> list[dict[str, float]]:
    group = torch.distributed.group.WORLD
    ranks = Ranks(rank, world_size, torch.device("cpu"), group, group)
    return [observed(kind, ranks, precision) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "world_size", "precision", "error"),
    [(["ddp", "fsdp2"], 2, "fp64", 1e-8), (["hsdp"], 4, "fp64", 1e-8), (["zero2", "zero3"], 2, "fp32", 1e-4)],
)
def test_every_engine_and_rank_finds_the_same(kinds: list[str], world_size: int, precision: str, error: float):
    expected = observed("single", SINGLE, precision)
    for records in run_ranks(observed_on_rank, world_size, kinds, precision):
        for found in records:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if name not in ("layers_seconds", "sigma/tracking_error"):
                    # An update of fp32 weights is a small difference of large numbers, and so is the sharpness.
                    rel = max(error, 1e-2) if error > 1e-6 and name.startswith(("update_ratio", "sharpness")) else error
                    assert found[name] == pytest.approx(value, rel=rel, abs=error / 1e4), name
            assert abs(found["sigma/tracking_error"] - expected["sigma/tracking_error"]) <= 10 * error


def test_names_of_records():
    found = observed("single", SINGLE)
    engine = engine_of("model.method=magneto_sigma")
    for step in (2, 3, 4):
        train_step(engine, SINGLE, *text(), step=step, lr=1e-3, seed=0, micro=2)
    internals = measure(engine, SINGLE, *text())
    assert (found["step"], found["tokens"]) == (4, 100)
    assert found["layer/0000/stream_rms"] == pytest.approx(math.sqrt(internals.stream_variance[0]))
    assert found["layer/0003/branch_rms"] == pytest.approx(math.sqrt(internals.branch_variance[3]))
    assert found["layer/0003/grad_norm"] == internals.gradient_norm[3]
    assert found["layer/0000/token_correlation"] == internals.token_correlation[0]
    assert found["attention/0001/entropy"] == internals.attention_entropy[1] > 0
    assert found["attention/0003/logit_max"] == internals.logit_max[3] > 0
    assert found["attention/0003/sink_share"] == internals.attention_sink[3] > 0
    assert found["layer/0002/kurtosis"] == internals.kurtosis[2] > 1
    assert found["layer/0000/angular_distance"] == 0 < found["layer/0003/angular_distance"] < 1
    assert 0 < found["update_ratio/query"] < 1
    assert found["sharpness"] > 0
    assert "attention/0000/entropy" not in found
    assert found["sigma/0003/fc2"] == engine.matrices.norms()["layers.2.feedforward.body.fc2"]
    assert abs(found["sigma/tracking_error"]) < 1e-3
    table = engine.module.get_parameter("embedding.weight")[:PIECES].detach()
    spread = table.double().numpy().std(axis=1)
    assert (found["embedding/tev_mean"], found["embedding/tev_std"]) == pytest.approx((spread.mean(), spread.std()))
    assert len(table) < len(engine.module.get_parameter("embedding.weight"))
    assert found["layers_seconds"] > 0


def test_sigma_names_and_rows():
    assert sigma_name("layers.3.attention.body.query") == "sigma/0004/query"
    assert sigma_name("layers.0.attention.body.key.down") == "sigma/0001/key.down"
    assert [rows_for(seq_len) for seq_len in (32, 1024, 4096)] == [32, 1, 1]


def test_never_asked_never_reads():
    def fail():
        raise AssertionError("the batch was read")

    engine = engine_of()
    observer = LayerObserver(engine, SINGLE, every=0, batch=fail, pieces=PIECES, record=lambda _: fail())
    observer.before(4)
    observer.step(4, 100)


def test_gauge_keeps_the_first_pass():
    decoder, (tokens, _) = decoder_of(), text()
    layer, positions = layer_of(decoder, 0), decoder.positions(tokens)
    gauge = LayerGauge(layer)
    chunks = decoder.stream.start(decoder.embed(tokens))
    layer(chunks, positions)
    first = dict(gauge.figures)
    layer((chunks[0][:1, :5],), positions=decoder.positions(tokens[:, :5]))
    assert gauge.figures == first
    assert len(first) == 5


@pytest.mark.slow
def test_training_is_bit_for_bit_the_same_with_a_resume_too(tiny_corpus, tmp_path: Path):
    common = [*TINY, *tiny_corpus.overrides(), "model.dropout=0.1", "train.steps=6", "model.method=magneto_sigma"]
    quiet, watched = (run("pretrain", *common, f"run.dir={tmp_path / name}", *more) for name, more in (
        ("quiet", []), ("watched", ["observe.layers_every=2", "observe.sharpness_every=3", "run.stop_after=3"])
    ))  # fmt: skip
    assert (quiet.returncode, watched.returncode) == (0, 75), quiet.stderr + watched.stderr
    assert "layer/" not in watched.stdout
    again = run("pretrain", *common, f"run.dir={tmp_path / 'watched'}", "observe.layers_every=3", "evaluate.every=0")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "watched") == losses(tmp_path / "quiet")
    measured = [step for step, record in last_records(tmp_path / "watched" / "metrics.jsonl").items() if NAME in record]
    assert measured == [2, 6]


def test_the_fixed_batch_is_the_beginning_of_the_first_global_batch(tiny_corpus):
    given = ["train.steps=5", "data.seq_len=32", "data.lanes=12", "train.global_batch_size=48", "model.n_heads=2"]
    loaded = load([], [*given, *tiny_corpus.overrides()])
    for world_size in (1, 4):
        prepared = prepare(loaded, Launch(world_size=world_size), AccelerateFlags(), "none")
        tokens, targets = layers_batch(prepared)
        whole = build_loader(prepared, SINGLE).next()
        assert tokens.shape == (32, 32)
        assert torch.equal(tokens, whole.tokens[:32])
        assert torch.equal(targets, whole.targets[:32])
