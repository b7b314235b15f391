"""Parameters of streams under every engine, recompute and torch.compile: the losses of one process."""

from functools import partialmethod

import pytest
import torch
from engine.matrix import equality
from engine.test_recompute import assert_same
from engine.test_sigma_engines import SINGLE, make_config, train

from stablelm.engine.torch_engine import TorchEngine

METHODS = ("hyper_connections", "mhc", "muddformer", "attention_residuals", "gtrxl")
# Far and soon enough for what starts at zero to count.
QUICK = ("train.lr=1e-2", "train.warmup_steps=0")
BLOCKS = "model.attention_residuals.block_size=3"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_three_steps_are_the_same_sharded_and_replicated(method: str):
    """fp64; ZeRO keeps fp32 at least, and its sums are in another order."""
    overrides = [*QUICK, BLOCKS, f"model.method={method}", "train.precision=fp64"]
    found = equality([("fsdp2", 2), ("ddp", 2)], overrides, steps=3)
    assert max(found.values()) <= 1e-9, found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_three_steps_are_the_same_in_fp32(method: str):
    """bf16: `test_every_method`."""
    found = equality([("zero1", 2), ("zero3", 2), ("fsdp2", 2)], [*QUICK, BLOCKS, f"model.method={method}"], steps=3)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_recompute_changes_nothing(method: str, mode: str):
    assert_same(mode, f"model.method={method}", *QUICK, BLOCKS)


@pytest.mark.parametrize("method", METHODS)
def test_tracing_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    options = (*QUICK, BLOCKS, "train.precision=fp64", "model.n_layers=2")
    losses = []
    for compiled in (False, True):
        config = make_config(method, *options, f"train.compile={compiled}")
        losses.append(train(TorchEngine(config, "single", SINGLE), config, SINGLE, steps=range(3)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][0] - losses[0][-1] > 1e-3
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
