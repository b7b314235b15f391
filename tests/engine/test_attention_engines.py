"""Gates, softmax variants, shaped and simplified attention, WeSaR: recomputed, traced and on several processes."""

from functools import partialmethod

import pytest
import torch
from engine.matrix import configuration, make_ranks, run_steps, single, worst
from support.distributed import run_ranks

from stablelm.engine.interface import build_engine

OWN = ("gated_attention", "attention_sink", "clipped_softmax", "shaped_attention", "sas", "sas_p", "wesar", "embed_ln")
CASES = {method: (f"model.method={method}",) for method in OWN} | {
    "softmax_one": ("model.method=softmax_one", "model.attention.gate=headwise", "model.gate.start=0.3"),
    "scaled_embed": ("model.method=scaled_embed", "model.embedding_gradient_scale=0.1"),
    "wesar_sink": ("model.method=wesar", "model.attention.softmax=sink", "model.attention.gate=elementwise"),
}
STEPS, FP64 = 3, "train.precision=fp64"


def on_rank(rank: int, world_size: int, kinds: tuple[str, ...]) -> dict[tuple[str, str], list[float]]:
    """Losses by case and kind, two micro-batches a step."""
    ranks, found = make_ranks(rank, world_size), {}
    for name, overrides in CASES.items():
        config = configuration(*overrides, FP64)
        for kind in kinds:
            found[name, kind] = run_steps(build_engine(config, kind, ranks), ranks, config, 1, STEPS, micro=3)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("fsdp2",), ("ddp", "zero3")], ids="-".join)
def test_two_processes_train_as_one(kinds: tuple[str, ...]):
    found = run_ranks(on_rank, 2, kinds, timeout=500)[0]
    for name, overrides in CASES.items():
        expected = single(*overrides, FP64, steps=STEPS)
        assert expected[0] != expected[-1]
        for kind in kinds:
            assert worst(found[name, kind], expected) < 1e-9, (name, kind)


@pytest.mark.parametrize("name", ["wesar_sink", "clipped_softmax", "shaped_attention", "sas_p"])
def test_recompute_changes_nothing(name: str):
    expected = single(*CASES[name], FP64, steps=STEPS)
    for mode in ("full", "attention", "selective"):
        assert single(*CASES[name], FP64, f"engine.recompute={mode}", steps=STEPS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["wesar_sink", "softmax_one", "clipped_softmax", "shaped_attention", "sas_p"])
def test_tracing_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """The traced graphs and their backward passes, run by torch."""
    expected = single(*CASES[name], FP64, steps=STEPS)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    assert single(*CASES[name], FP64, "train.compile=true", steps=STEPS) == pytest.approx(expected, rel=1e-10)


def test_traced_layers_in_bf16_take_the_kernel_by_blocks(monkeypatch: pytest.MonkeyPatch):
    """Which knows of a learned term in the denominator, and of its gradient."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr("stablelm.model.attention.blockwise._compiled", lambda function: function)
    overrides = (*CASES["attention_sink"], "train.precision=bf16")
    torch.compiler.reset()
    traced = single(*overrides, "train.compile=true", steps=STEPS)
    assert traced == pytest.approx(single(*overrides, steps=STEPS), rel=2e-3)
