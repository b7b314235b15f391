"""The weights of a checkpoint that are evaluated and exported: trained ones, an average, or the mean of several."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.checkpoint.format import load_tensors
from stablelm.checkpoint.manifest import TENSORS, step_of
from stablelm.checkpoint.reader import MODEL_PREFIX
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.checkpoint.selection import step_directories, verify_together
from stablelm.config.averages import EMA, NONE, Average, chosen
from stablelm.config.schema import Config, TrainConfig
from stablelm.engine.consensus import Consensus
from stablelm.engine.tensor_parts import FlatShard, local_part
from stablelm.errors import CheckpointError
from stablelm.optimizers import catalogue

OPTIMIZER_PREFIX = "optim."


@dataclass(frozen=True)
class EvaluatedWeights:
    """How to read the weights of a checkpoint: `train` of its run, and which average of them."""

    checkpoint: CheckpointPath
    train: TrainConfig
    average: Average

    @classmethod
    def of(cls, checkpoint: CheckpointPath, config: Config) -> "EvaluatedWeights":
        """As the run's `evaluate.average` says."""
        return cls(checkpoint, config.train, chosen(config.evaluate, config.train))

    @property
    def trained(self) -> bool:
        """Whether these are the tensors `model.*` themselves."""
        return self.average.kind == NONE and not catalogue.find(self.train).evaluation_state()

    def load(self, tensors: Mapping[str, Tensor], parameters: set[str], group: dist.ProcessGroup | None = None) -> None:
        """Fills live tensors `model.<name>` of any layout; the names in `parameters` are learned, the rest buffers.

        Collective over `group`. Raises CheckpointError where the checkpoint lacks what the average needs.
        """
        learned = {name: tensor for name, tensor in tensors.items() if name.removeprefix(MODEL_PREFIX) in parameters}
        others = {name: tensor for name, tensor in tensors.items() if name not in learned}
        self._read(self.checkpoint, others, group)
        if self.average.kind == "last":
            self._load_mean(learned, group)
        elif self.average.kind == EMA:
            self._read(self.checkpoint, {_state(name, EMA): tensor for name, tensor in learned.items()}, group)
        else:
            self._read(self.checkpoint, learned, group)
            self._convert(learned, group)

    def _convert(self, learned: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Where gradients are taken at other weights than those that are evaluated."""
        update = catalogue.find(self.train)
        names = update.evaluation_state()
        if not names:
            return
        state = {own: {name: empty_like(tensor) for name, tensor in learned.items()} for own in names}
        for own, found in state.items():
            self._read(self.checkpoint, {_state(name, own): tensor for name, tensor in found.items()}, group)
        for name, tensor in learned.items():
            evaluated = update.evaluated(local(tensor), {own: local(found[name]) for own, found in state.items()})
            assert evaluated is not None
            local(tensor).copy_(evaluated)

    def _load_mean(self, learned: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
        paths = self.averaged()
        part = {name: empty_like(tensor) for name, tensor in learned.items()}
        for tensor in learned.values():
            local(tensor).zero_()
        for path in paths:
            if path != self.checkpoint:
                verified(path, group)
            self._read(path, part, group)
            for name, tensor in learned.items():
                local(tensor).add_(local(part[name]), alpha=1 / len(paths))

    def averaged(self, *, strict: bool = False) -> list[CheckpointPath]:
        """The checkpoint and the newest before it, as many as are averaged, or as there are.

        Raises CheckpointError if there are fewer and `strict`.
        """
        if self.average.checkpoints == 1:
            return [self.checkpoint]
        found = [self.checkpoint, *earlier(self.checkpoint)][: self.average.checkpoints]
        if strict and len(found) < self.average.checkpoints:
            raise CheckpointError(
                f"the mean of {self.average.checkpoints} checkpoints was asked for, and {self.checkpoint.parent} has "
                f"{len(found)} up to step {step_of(self.checkpoint)}: ask for fewer, or use --average none"
            )
        return found

    def _read(self, path: CheckpointPath, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        if tensors:
            load_tensors(path / TENSORS, tensors, group, partial=True)


def verified(path: CheckpointPath, group: dist.ProcessGroup | None) -> None:
    """Raises CheckpointError on all ranks if a checkpoint is damaged; each hashes a share of its files."""
    rank = 0 if group is None else dist.get_rank(group)
    if problems := verify_together(path, Consensus(group, rank)):
        raise CheckpointError(f"{path} is damaged ({problems[0]}), and its weights are to be averaged: average fewer")


def earlier(checkpoint: CheckpointPath) -> list[CheckpointPath]:
    """The checkpoints beside this one of earlier steps, the newest first."""
    step = step_of(checkpoint) or 0
    return [path for path in step_directories(checkpoint.parent) if (step_of(path) or 0) < step]


def empty_like(tensor: Tensor) -> Tensor:
    """A tensor of the same layout, its values unset."""
    if isinstance(tensor, FlatShard):
        return FlatShard(
            torch.empty_like(tensor.local), tensor.shape, tensor.start, copies=tensor.copies, copy=tensor.copy
        )
    return torch.empty_like(tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's elements, live."""
    return tensor.local if isinstance(tensor, FlatShard) else local_part(tensor)


def _state(name: str, own: str) -> str:
    return f"{OPTIMIZER_PREFIX}{name.removeprefix(MODEL_PREFIX)}.{own}"
