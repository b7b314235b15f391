"""Learned factors of skips, branches and heads train alike on every engine, recomputed and compiled too."""

import pytest
from engine.matrix import Cell, equality, single, worst

METHODS = {
    **{name: (f"model.method={name}",) for name in ("keel", "mix_ln", "skipinit", "admin", "resi_dual")},
    "layerscale": ("model.method=layerscale", "model.layerscale.start=0.5"),
    "normformer": ("model.method=normformer", "model.stream=res_scale"),
}
# Steps so large that a factor whose gradient was lost or counted twice shows in the losses.
STEPS, LARGE = 3, ("train.lr=1e-2", "train.warmup_steps=0")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_one_process(method):
    cells: list[Cell] = [("ddp", 2), ("fsdp2", 2)]
    found = equality(cells, [*METHODS[method], *LARGE, "train.precision=fp64"], steps=STEPS)
    assert max(found.values()) <= 1e-9, found


@pytest.mark.parametrize("method", METHODS)
def test_losses_under_deepspeed_are_those_of_one_process(method):
    cells: list[Cell] = [("zero1", 2), ("zero3", 2)]
    found = equality(cells, [*METHODS[method], *LARGE], steps=STEPS)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_train_alike(method):
    found = equality([("fsdp2", 2)], [*METHODS[method], *LARGE, "engine.recompute=full"], steps=STEPS)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("method", ["keel", "mix_ln", "normformer", "resi_dual"])
def test_compiled_layers_train_alike(method):
    """Of different kinds in one model, of different parameters, of two tensors."""
    plain = single(*METHODS[method], *LARGE, steps=STEPS)
    compiled = single(*METHODS[method], *LARGE, "train.compile=true", steps=STEPS)
    assert worst(compiled, plain) <= 1e-5
