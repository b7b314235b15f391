"""An update that must not be made changes nothing on any rank, whatever the engine: not finite, or too large a norm."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from matrix import VOCABULARY, configuration, make_ranks
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.engine.interface import StepResult, build_engine
from stablelm.engine.optimizers import refused
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import FlatShard
from stablelm.train.guards import NO_UPDATE
from stablelm.train.step import train_step

KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SMALL = ("model.n_layers=2", "model.d_model=16", "data.seq_len=8", "train.global_batch_size=4")


def take(engine: Any, ranks: Ranks, step: int, **options: Any) -> StepResult:
    rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
    own = rows[ranks.rank :: ranks.world_size]
    return train_step(engine, ranks, own[:, :-1], own[:, 1:], step=step, lr=1e-2, seed=0, micro=1, **options)


def held(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's part of the whole state, copied."""
    return {name: _local(tensor).detach().clone() for name, tensor in engine.tensors().items()}


def _local(tensor: Any) -> torch.Tensor:
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def outcome(rank: int, world_size: int, kind: str, overrides: tuple[str, ...] = ()) -> dict[str, bool]:
    ranks, config = make_ranks(rank, world_size), configuration(*SMALL, *overrides)
    engine, never = (build_engine(config, kind, ranks) for _ in range(2))
    for each in (engine, never):
        take(each, ranks, 1)
        take(each, ranks, 2)
    before = held(engine)
    told = {"moved": not same(before, held(build_engine(config, kind, ranks)))}
    # One rank alone computes nonsense; the others must not follow their own sound figures.
    for name, factor in {"nan": math.nan, "inf": math.inf}.items():
        result = take(engine, ranks, 3, loss_factor=factor if rank == world_size - 1 else 1.0)
        told[name] = bool(result.skipped) and same(before, held(engine)) and not math.isfinite(result.grad_norm)
    result = take(engine, ranks, 4, largest_norm=1e-3)
    told["large norm"] = bool(result.skipped) and same(before, held(engine)) and math.isfinite(result.grad_norm)
    again = take(engine, ranks, 4, largest_norm=NO_UPDATE)
    pairs = ((result.cross_entropy, again.cross_entropy), (result.grad_norm, again.grad_norm))
    told["again"] = same(before, held(engine)) and all(float(one) == float(other) for one, other in pairs)
    result = take(engine, ranks, 5, largest_norm=1e3)
    take(never, ranks, 5)
    told["goes on"] = not bool(result.skipped) and same(held(engine), held(never)) and not same(before, held(engine))
    return told


@cache
def on_ranks(kind: str, world_size: int) -> list[dict[str, bool]]:
    return run_ranks(outcome, world_size, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_on_any_rank(kind: str):
    for told in on_ranks(kind, 2):
        assert told == dict.fromkeys(told, True)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_nothing_changes_in_one_process(precision: str):
    told = outcome(0, 1, "single", (f"train.precision={precision}",))
    assert told == dict.fromkeys(told, True)


def test_a_loss_that_is_not_finite_skips_although_its_gradient_is():
    config, ranks = configuration(*SMALL), Ranks(0, 1, torch.device("cpu"), None, None)
    engine = build_engine(config, "single", ranks)
    loss = engine.loss

    def shifted(tokens: torch.Tensor, targets: torch.Tensor, **options: Any) -> Any:
        sums = loss(tokens, targets, **options)
        return sums._replace(total=sums.total + math.inf)

    engine.loss = shifted  # type: ignore[method-assign]
    before = held(engine)
    assert bool(take(engine, ranks, 1).skipped)
    assert same(before, held(engine))


@pytest.mark.parametrize(
    ("norm", "largest", "expected"),
    [
        (1.0, math.inf, False),
        (math.inf, math.inf, True),
        (math.nan, math.inf, True),
        (2.0, 2.0, False),
        (2.0, 1.9, True),
        (1.0, 1e300, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_refused(norm: float, largest: float, expected: bool, dtype: torch.dtype):
    assert bool(refused(torch.tensor(norm, dtype=dtype), largest)) is expected
