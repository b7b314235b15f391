"""FSDP2's choices: where micro-batches add up, what stays gathered, in which digits ranks sum. The run is the same."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from engine.test_engines import MODEL, TRAIN, ranks_here, text
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from stablelm.config.schema import Config, EngineConfig
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods.catalogue import apply_method
from stablelm.train.step import train_step

MICRO = 3  # micro-batches of a step
LAYERS = 4  # each a unit
GATHER, REDUCE, SUM = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"


def make(kind: str, ranks: Ranks, precision: str, **engine: Any) -> TorchEngine:
    model = dataclasses.replace(apply_method(MODEL), n_layers=LAYERS)
    train: Any = dataclasses.replace(TRAIN, precision=precision, grad_clip=1.0)
    return TorchEngine(Config(model=model, train=train, engine=EngineConfig(unit_bytes=1, **engine)), kind, ranks)


def losses(engine: TorchEngine, ranks: Ranks, first: int, steps: int) -> list[float]:
    """Of this rank; in the middle a pass without gradients, as an evaluation makes them."""
    found = []
    for step in range(first, first + steps):
        rows = text(step)[ranks.rank :: ranks.world_size]
        with torch.no_grad():
            engine.loss(rows[:1, :-1], rows[:1, 1:].contiguous())
        size = len(rows) // MICRO
        result = train_step(engine, ranks, rows[:, :-1], rows[:, 1:], step=step, lr=1e-2, seed=0, micro=size)
        found += [float(result.cross_entropy), float(result.grad_norm)]
    return found


def collectives(engine: TorchEngine, ranks: Ranks) -> Counter[str]:
    """Of the micro-batches of a step."""
    rows, counts = text()[ranks.rank :: ranks.world_size], Counter[str]()
    engine.loaded()
    for index, part in enumerate(rows.chunk(MICRO)):
        last = index == MICRO - 1
        with CommDebugMode() as counted:
            engine.backward(engine.loss(part[:, :-1], part[:, 1:].contiguous(), last=last).total, last=last)
        counts += Counter({str(op).rpartition(".")[2]: n for op, n in counted.get_comm_counts().items()})
    engine.clear_gradients()
    return counts


def continue_in(other: TorchEngine, engine: TorchEngine) -> None:
    """Fills an engine with the state of another, as a resume does."""
    with torch.no_grad():
        for name, tensor in other.tensors().items():
            held, given = (t.to_local() if isinstance(t, DTensor) else t for t in (tensor, engine.tensors()[name]))
            held.copy_(given)
    other.loaded()


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"accumulate": "sharded"},
    "never": {"reshard_after_forward": "never"},
    "never, sharded": {"reshard_after_forward": "never", "accumulate": "sharded", "prefetch": 3},
    "always": {"reshard_after_forward": "always", "accumulate": "local"},
}


def on_rank(rank: int, world_size: int, kind: str) -> dict[str, tuple[list[float], Counter[str]]]:
    ranks = ranks_here(rank, world_size)
    engines = {name: make(kind, ranks, "fp64", **options) for name, options in CHOICES.items()}
    found = {name: (losses(engine, ranks, 1, 2), collectives(engine, ranks)) for name, engine in engines.items()}
    resumed = make(kind, ranks, "fp64", accumulate="local")
    continue_in(resumed, engines["sharded"])
    found["resumed"] = found["plain"][0] + losses(resumed, ranks, 3, 1), Counter()
    found["plain"] = found["plain"][0] + losses(engines["plain"], ranks, 3, 1), found["plain"][1]
    return found


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp2", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_choices_change_collectives_and_not_the_run(kind: str, world_size: int):
    for found in run_ranks(on_rank, world_size, kind):
        expected = found["plain"][0]
        for name, (figures, _) in found.items():
            assert figures == pytest.approx(expected[: len(figures)], rel=1e-12), name
        assert len(found["resumed"][0]) == len(expected) == 6
        parts = LAYERS + 2  # embedding and head
        counts = {name: (counted[GATHER], counted[REDUCE]) for name, (_, counted) in found.items()}
        assert counts["plain"] == (MICRO * (2 * LAYERS + 1) + 1, parts)
        assert counts["sharded"] == (counts["plain"][0], MICRO * parts)
        assert counts["never"] == (parts, parts)
        assert counts["never, sharded"] == (parts, MICRO * parts)
        assert counts["always"] == (MICRO * (2 * LAYERS + 1 + 2), parts)
        # The vectors, which are whole, and under hsdp the sums over copies: once a step, whatever is reduced before.
        sums = 1 + parts * (kind == "hsdp")
        assert {counted[SUM] for name, (_, counted) in found.items() if name != "resumed"} == {sums}


def sums_in_bf16(rank: int, world_size: int) -> dict[str, tuple[dict[str, torch.Tensor], set[torch.dtype]]]:
    """The gradients of a step, and their dtypes."""
    ranks, found = ranks_here(rank, world_size), {}
    rows = text()[rank::world_size]
    for dtype in ("fp32", "bf16"):
        engine = make("fsdp2", ranks, "bf16", reduce_dtype=dtype)
        for index, part in enumerate(rows.chunk(MICRO)):
            last = index == MICRO - 1
            engine.backward(engine.loss(part[:, :-1], part[:, 1:].contiguous(), last=last).total, last=last)
        found[dtype] = engine.gradients(), {gradient.dtype for gradient in engine.gradients().values()}
        engine.clear_gradients()
    return found


def test_gradients_summed_in_bf16_are_rounded_once_a_micro_batch():
    (exact, dtypes), (rounded, others) = run_ranks(sums_in_bf16, 2)[0].values()
    assert dtypes == others == {torch.float32}
    errors = {name: float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    outside = {name for name in exact if exact[name].ndim < 2 or not name.startswith("layers")}
    assert all(errors[name] < 1e-6 for name in outside)  # ranks are added up first, or micro-batches
    assert all(0 < errors[name] < 2**-8 for name in set(exact) - outside)
