"""The largest eigenvalue of the Hessian: against power iteration by itself, and without a trace in the training."""

import math

import pytest
import torch
from support.measured import PIECES, SINGLE, engine_of, text
from torch import Tensor

from stablelm.config import rules
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.observe.sharpness import sharpness
from stablelm.train.step import train_step

SMALL = ("model.n_layers=1", "model.d_model=8", "model.n_heads=2", "model.d_ff=8")


def gradient(engine: TorchEngine) -> Tensor:
    engine.loaded()
    sums = engine.loss(*text())
    engine.backward(sums.total / sums.valid, last=True)
    found = torch.cat([p.grad.flatten() for p in engine.parameters().values() if p.grad is not None])
    engine.clear_gradients()
    return found


def product(engine: TorchEngine, vector: Tensor, step: float = 1e-5) -> Tensor:
    """By differences of gradients, over one long vector."""
    parameters = list(engine.parameters().values())
    start, sides = [p.detach().clone() for p in parameters], []
    for sign in (1, -1):
        pieces = vector.split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, first, piece in zip(parameters, start, pieces, strict=True):
                p.copy_(first + sign * step * piece.view_as(p))
        sides.append(gradient(engine))
    with torch.no_grad():
        for p, first in zip(parameters, start, strict=True):
            p.copy_(first)
    engine.loaded()
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("method", ["pre_ln", "magneto_sigma"])
def test_it_is_the_largest_eigenvalue(method: str):
    """Power iteration on H + 50, whose largest eigenvalue in size belongs to the largest of H."""
    engine = engine_of(*SMALL, f"model.method={method}")
    found = sharpness(engine, SINGLE, *text())
    engine.module.eval()
    size = sum(p.numel() for p in engine.parameters().values())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(150):
        vector = vector / vector.norm()
        vector = product(engine, vector) + 50 * vector
    vector = vector / vector.norm()
    assert found == pytest.approx(float(vector @ product(engine, vector)), rel=0.02)


def spectral_norms(engine: TorchEngine) -> list[Tensor]:
    """What follows from the weights, and no checkpoint holds."""
    return [buffer for name, buffer in engine.module.named_buffers() if name.endswith(".sigma")]


def test_it_changes_nothing():
    engine = engine_of("model.method=magneto_sigma", "model.dropout=0.2")
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    factors = [sigma.clone() for sigma in spectral_norms(engine)]
    generator = torch.get_rng_state()
    found = sharpness(engine, SINGLE, *text())
    assert sharpness(engine, SINGLE, *text()) == found  # no dropout in it
    assert torch.equal(torch.get_rng_state(), generator)
    assert engine.module.training
    assert all(p.grad is None for p in engine.parameters().values())
    assert all(torch.equal(engine.tensors()[name], tensor) for name, tensor in before.items())
    assert factors
    assert all(map(torch.equal, factors, spectral_norms(engine)))


@pytest.mark.parametrize(
    "options", [("engine.recompute=full",), ("engine.optimizer_in_backward=true", "train.grad_clip=0")]
)
def test_the_engine_makes_no_difference(options: tuple[str, ...]):
    plain = sharpness(engine_of(*SMALL), SINGLE, *text())
    engine = engine_of(*SMALL, *options)
    train_step(engine, SINGLE, *text(), step=1, lr=0.0, seed=0, micro=2)  # nothing of a step is left over
    assert sharpness(engine, SINGLE, *text()) == pytest.approx(plain, rel=1e-6)


def test_fp32_is_close_to_fp64():
    exact = sharpness(engine_of(*SMALL), SINGLE, *text())
    assert sharpness(engine_of(*SMALL, "train.precision=fp32"), SINGLE, *text()) == pytest.approx(exact, rel=0.02)


def test_a_loss_that_is_not_finite_gives_nan():
    engine = engine_of(*SMALL)
    with torch.no_grad():
        next(iter(engine.parameters().values())).fill_(math.inf)
    assert math.isnan(sharpness(engine, SINGLE, *text()))


@pytest.mark.parametrize("by_flag", [False, True])
def test_bf16_is_refused(by_flag: bool):
    given = [] if by_flag else ["train.precision=bf16"]
    loaded = load([], ["train.steps=5", "observe.sharpness_every=10", *given])
    words = r"observe.sharpness_every=10 .*=bf16 rounds away; use train.precision=fp32"
    with pytest.raises(ConfigError, match=words):
        rules.check(loaded.config, 1, "bf16" if by_flag else None, loaded.origins)
    config = load([], ["train.steps=5", "observe.sharpness_every=10"]).config
    assert resolve(config, pieces=PIECES, world_size=1, accelerate_precision=None).observe.sharpness_every == 10
