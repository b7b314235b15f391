"""The global gradient norm of every engine lies within 1e-6 of the fp64 norm of the same gradients."""

import dataclasses
import math

import pytest
import torch
from engine.test_engines import MODEL, TRAIN, ranks_here, text
from support.distributed import run_ranks

from stablelm.config.schema import Config, EngineConfig
from stablelm.engine.interface import build_engine
from stablelm.engine.optimizers import clip, squared_norm, total_norm
from stablelm.engine.ranks import Ranks
from stablelm.methods.catalogue import apply_method

WIDE = apply_method(dataclasses.replace(MODEL, vocab_size=40_000, d_model=128))


def exact(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("shape", [(20_000, 1024), (4097,), (4096,), (4095, 3), (1,), (0, 8)])
def test_many_elements_lose_no_digits(shape: tuple[int, ...]):
    draw = torch.Generator().manual_seed(1)
    gradients = [torch.rand(shape, generator=draw) + 0.5, torch.rand(3, generator=draw)]
    found = float(squared_norm(gradients).sqrt())
    assert found == pytest.approx(exact(gradients), rel=1e-7)
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = total_norm(parameters)
    assert norm.dtype == torch.float32
    clip(parameters, 0.25, norm)
    assert exact(gradients) == pytest.approx(0.25, rel=2e-5)  # torch's rule adds 1e-6 to the norm


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(value: float):
    parameter = torch.nn.Parameter(torch.zeros(5000))
    parameter.grad = torch.ones(5000)
    parameter.grad[3] = value
    assert not math.isfinite(float(total_norm([parameter])))


def norms_of(rank: int, world_size: int, kind: str) -> tuple[float, float]:
    """The norm that a step reports, and that of the gradients themselves."""
    ranks = ranks_here(rank, world_size) if world_size > 1 else Ranks(0, 1, torch.device("cpu"), None, None)
    train = dataclasses.replace(TRAIN, grad_clip=0.5)
    engine = build_engine(Config(model=WIDE, train=train, engine=EngineConfig(unit_bytes=1)), kind, ranks)
    rows = text()[rank::world_size]
    sums = engine.loss(rows[:, :-1], rows[:, 1:].contiguous())
    engine.backward(sums.total / 192, last=True)
    each = engine.gradient_norms()
    return float(engine.step(1e-3)), math.sqrt(sum(float(norm) ** 2 for norm in each.values()))


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("single", 1), ("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_the_reported_norm_is_that_of_the_gradients(kind: str, world_size: int):
    found = run_ranks(norms_of, world_size, kind) if world_size > 1 else [norms_of(0, 1, kind)]
    for reported, wanted in found:
        assert reported == pytest.approx(wanted, rel=1e-6)
