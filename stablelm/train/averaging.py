"""Evaluations within a run take the weights of `evaluate.average`; training continues with its own, to the last bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stablelm.checkpoint.format import load_tensors
from stablelm.checkpoint.manifest import TENSORS, step_of
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.checkpoint.selection import step_directories
from stablelm.checkpoint.weights import empty_like, local, verified
from stablelm.config.averages import EMA, chosen
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.optimizers import catalogue


@contextmanager
def evaluated_weights(
    engine: Engine, ranks: Ranks, config: Config, before: Callable[[], list[CheckpointPath]]
) -> Iterator[None]:
    """The engine has the weights to evaluate inside the with block. Collective.

    `before`: the run's checkpoints of earlier steps, the newest first, the same on all ranks; called if they are
    averaged. Where there are fewer of them yet, those that there are count.
    """
    average, update = chosen(config.evaluate, config.train), catalogue.find(config.train)
    held = engine.tensors()
    names = [name.removeprefix("optim.").removesuffix(".step") for name in held if name.endswith(".step")]
    weights = {name: held[f"model.{name}"] for name in names}
    state = update.evaluation_state()
    paths = before()[: average.checkpoints - 1] if average.kind == "last" else []
    if average.kind != EMA and not paths and not state:
        yield
        return
    own = {name: local(tensor).clone() for name, tensor in weights.items()}
    try:
        if average.kind == EMA:
            _set(weights, lambda name: local(held[f"optim.{name}.{EMA}"]))
        elif state:
            _set(weights, lambda name: update.evaluated(own[name], _state(held, name, state)))
        else:
            _set_mean(weights, own, paths, ranks)
        engine.loaded()
        yield
    finally:
        _set(weights, own.__getitem__)
        engine.loaded()


def checkpoints_before(root: CheckpointPath, step: int) -> list[CheckpointPath]:
    """The committed checkpoints of steps before `step`, the newest first."""
    return [path for path in step_directories(root) if (step_of(path) or 0) < step]


def _state(held: dict[str, Tensor], name: str, state: tuple[str, ...]) -> dict[str, Tensor]:
    return {own: local(held[f"optim.{name}.{own}"]) for own in state}


@torch.no_grad()
def _set(weights: dict[str, Tensor], value: Callable[[str], Tensor | None]) -> None:
    for name, tensor in weights.items():
        found = value(name)
        assert found is not None
        local(tensor).copy_(found)


@torch.no_grad()
def _set_mean(weights: dict[str, Tensor], own: dict[str, Tensor], paths: list[CheckpointPath], ranks: Ranks) -> None:
    """The mean of the weights and those of the checkpoints."""
    part = {f"model.{name}": empty_like(tensor) for name, tensor in weights.items()}
    share = 1 / (len(paths) + 1)
    _set(weights, lambda name: own[name] * share)
    for path in paths:
        verified(path, ranks.cpu_group)
        load_tensors(path / TENSORS, part, ranks.cpu_group, partial=True)
        for name, tensor in weights.items():
            local(tensor).add_(local(part[f"model.{name}"]), alpha=share)
