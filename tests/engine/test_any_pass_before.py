"""What an engine says of its tensors never depends on the passes that ran before."""

import dataclasses
from typing import Any

import pytest
import torch
from engine.test_engines import MODEL, TRAIN, ranks_here, text
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.config.schema import Config, EngineConfig
from stablelm.data.validation import ValidationSet
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.perplexity import evaluate
from stablelm.methods.catalogue import apply_method
from stablelm.model.attention.cache import KeyValueCache
from stablelm.observe.layers import measure
from stablelm.train.step import train_step

ENGINES = [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
# A head that is spectrally normalised lies in the root unit, which an evaluation leaves gathered.
SIGMA = apply_method(dataclasses.replace(MODEL, method="sigma_reparam"))


def make(kind: str, ranks: Ranks) -> Engine:
    # Each layer a unit of its own.
    config = Config(model=SIGMA, train=TRAIN, engine=EngineConfig(unit_bytes=1))
    return build_engine(config, kind, ranks)


def score(engine: Engine, ranks: Ranks) -> float:
    rows = text(9)
    data = ValidationSet(rows[:, :-1], rows[:, 1:], bytes_per_token=4.0, documents=12)
    return evaluate(engine, ranks, data, 3).loss


def generated(engine: Engine) -> torch.Tensor:
    """Logits of two passes with a cache, equal to those of one without."""
    tokens, cache = text(8)[:3, :9], KeyValueCache(SIGMA, 3)
    last = torch.tensor([5, 5, 5])
    engine.module.eval()
    with torch.no_grad():
        engine.logits(tokens[:, :3], last - 3, cache)
        found = engine.logits(tokens[:, 3:], last, cache)
        torch.testing.assert_close(found, engine.logits(tokens, last + 3), rtol=1e-5, atol=1e-5)
    engine.module.train()
    return found


def train(engine: Engine, ranks: Ranks, step: int) -> float:
    rows = text(step)[ranks.rank :: ranks.world_size]
    return float(
        train_step(engine, ranks, rows[:, :-1], rows[:, 1:], step=step, lr=1e-3, seed=0, micro=3).cross_entropy
    )


def described(engine: Engine) -> dict[str, Any]:
    """Name, kind, shape, values and place in memory of every tensor, and the tracked norms."""
    tensors = {
        name: (type(tensor).__name__, tuple(tensor.shape), local(tensor).data_ptr(), local(tensor).tolist())
        for name, tensor in engine.tensors().items()
    }
    return {**tensors, "sigma": engine.matrices.norms()}


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "local", tensor)


def passes(rank: int, world_size: int, kind: str) -> None:
    ranks = ranks_here(rank, world_size)
    engine = make(kind, ranks)
    rows = text(7)
    before = [
        lambda: None,
        lambda: score(engine, ranks),
        lambda: generated(engine),
        lambda: measure(engine, ranks, rows[:, :-1], rows[:, 1:]),
        lambda: engine.backward(engine.loss(rows[:, :-1], rows[:, 1:], last=False).total * 0, last=False),
    ]
    for step, first in enumerate(before, 1):
        train(engine, ranks, step)
        wanted = described(engine)
        first()
        assert described(engine) == wanted
        engine.clear_gradients()


@pytest.mark.parametrize(("kind", "world_size"), ENGINES)
def test_tensors_are_the_same_after_any_pass(kind: str, world_size: int):
    run_ranks(passes, world_size, kind)


def returns(rank: int, world_size: int, kind: str) -> list[float]:
    """Losses of steps 1 to 4; then those of steps 3 and 4 from the state at step 2, loaded after an evaluation."""
    ranks = ranks_here(rank, world_size)
    engine = make(kind, ranks)
    found = [train(engine, ranks, step) for step in (1, 2)]
    held = {name: local(tensor).clone() for name, tensor in engine.tensors().items()}
    valid = score(engine, ranks)
    found += [train(engine, ranks, step) for step in (3, 4)]
    assert score(engine, ranks) != valid
    for name, tensor in engine.tensors().items():
        local(tensor).copy_(held[name])
    engine.loaded()
    assert score(engine, ranks) == valid
    return found + [train(engine, ranks, step) for step in (3, 4)]


@pytest.mark.parametrize(("kind", "world_size"), ENGINES)
def test_what_is_loaded_after_an_evaluation_counts(kind: str, world_size: int):
    for found in run_ranks(returns, world_size, kind):
        assert found[4:] == found[2:4]
