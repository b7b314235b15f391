"""What a training step needs of an engine: the protocol that every kind of engine implements."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablelm.config.engine_rules import ZERO
from stablelm.config.schema import Config, TrainConfig
from stablelm.engine.after_step import Reparametrised
from stablelm.engine.peak_memory import choice
from stablelm.engine.ranks import Ranks
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder
from stablelm.model.loss import LossSums, TokenScores


@dataclass(frozen=True)
class StepResult:
    """Device tensors, read only when a record is due: no host sync in the step."""

    cross_entropy: Tensor
    """Sum over this rank's valid targets, nats; 0-dim."""
    valid: Tensor
    """Valid targets of this rank; 0-dim int64."""
    grad_norm: Tensor
    """Global norm before clipping; 0-dim, the same on all ranks."""
    skipped: Tensor
    """Whether nothing was updated because of it; 0-dim bool."""
    objective: Tensor | None = None
    """Sum of `train.loss` over this rank's valid targets, the cross-entropy without one; 0-dim."""


class Engine(Protocol):
    """A model and its optimizer, spread over the ranks in one way or another.

    Between `backward(..., last=True)` and `step`, gradients are complete on every rank.
    """

    kind: str
    device: torch.device
    matrices: Reparametrised
    """Refreshed by `step`; its tracking errors are a collective on sharded weights."""

    @property
    def module(self) -> Decoder:
        """The decoder; its parameters may be shards."""
        ...

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        last: bool = True,
        boundaries: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> LossSums:
        """Sums over this rank's (batch, seq) targets; gradients follow torch's grad mode.

        `last` as its `backward` will say; `boundaries`, `factors`: of `Decoder.boundaries` and
        `Decoder.branch_factors`.
        """
        ...

    def drawn(self, tokens: Tensor, draws: Tensor, *, boundaries: Tensor | None = None) -> Tensor:
        """Targets (batch, seq) int64 from the model's own distribution after tokens (batch, seq): the inverse of its
        cumulative sum at draws (batch, seq), uniform in [0, 1). Without gradients; called by all ranks."""
        ...

    def logits(self, tokens: Tensor, columns: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (batch, vocab_size) of one column of each row of tokens (batch, seq), on every rank alike.

        Collective where weights are sharded; never compiled, since the shapes change. `cache`: as of `Decoder`.
        """
        ...

    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> TokenScores:
        """Of each target (n,) after its place (n,), an index into the (batch, seq) tokens; n may be 0.

        Called by all ranks, or by none, without gradients.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`, summed over ranks; `last` marks the step's last micro-batch."""
        ...

    def begin(self, lr: float | None) -> None:
        """Before the passes of a step, whose rate an engine needs that updates in the backward pass.

        None: those passes free their gradients as a step's would, and change nothing.
        """
        ...

    def passes(self, step: int) -> tuple[str, ...]:
        """The passes over the batch of an optimizer step, from 1 (`optimizers.interface.PASSES`); begins them."""
        ...

    def begin_pass(self, kind: str) -> None:
        """Before a pass's first micro-batch."""
        ...

    def end_pass(self, kind: str, valid: Tensor) -> None:
        """After a pass's last micro-batch, with the valid targets of all ranks (0-dim); collective.

        After the step's last pass weights are as before the first, and gradients those of the update.
        """
        ...

    def use(self, train: TrainConfig) -> None:
        """Works with other settings of a resolved configuration from now on: of z_loss, grad_clip and decay."""
        ...

    def step(self, lr: float, *, largest_norm: float = math.inf) -> Tensor:
        """Clips by global norm, updates, clears the gradients; returns the norm before clipping (0-dim).

        Where `engine.optimizers.refused(norm, largest_norm)` nothing changes on any rank: weights, moments, step counts
        and the vectors of spectral norms stay bit for bit.
        """
        ...

    def clear_gradients(self) -> None:
        """Forgets the gradients without an update."""
        ...

    def tensors(self, *, optimizer: bool = True) -> dict[str, Tensor]:
        """Live tensors under portable names: `model.<name>`, `optim.<name>.<state>`, as exp_avg, exp_avg_sq and step.

        State has the dtype of `train.moments`, with `optim.<name>.{exp_avg,exp_avg_sq}_scale` beside int8 ones.
        Buffers that are state, the vectors of spectral norms, are among the first. Each is plain (equal on all
        ranks), a DTensor or a `engine.tensor_parts.FlatShard`; filling them in place restores the state, once
        `loaded` was called. They are the same tensors whatever passes ran before.
        """
        ...

    def loaded(self, *, weights_alone: bool = False) -> None:
        """To be called on all ranks once `tensors` were filled: brings working copies, and buffers that follow from
        weights (the spectral norms themselves), up to date; collective where weights are sharded.

        `weights_alone`: optimizer state that starts as the weights starts again from them.
        """
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, on every rank, before `step`; a collective, for small models."""
        ...

    def gradient_shards(self) -> dict[str, Tensor]:
        """Live gradients by parameter name before `step`, not clipped; each as the ones of `tensors`."""
        ...

    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of every gradient by parameter name, 0-dim fp64 on the CPU, before `step`; a collective."""
        ...

    def whole(self, name: str) -> Tensor:
        """A copy of a whole parameter, on every rank; a collective."""
        ...


def build_engine(config: Config, kind: str, ranks: Ranks, *, train: bool = True) -> Engine:
    """The model of a resolved `config` spread over `ranks`, with its optimizer unless `train` is False.

    Collective. Raises ConfigError for what the machine lacks. Without `train` nothing is recomputed.
    """
    config = choice.resolved(config, kind, ranks)[0] if train else choice.with_mode(config, "none")
    if kind in ZERO:
        from stablelm.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, kind, ranks, train=train)
    from stablelm.engine.torch_engine import TorchEngine

    return TorchEngine(config, kind, ranks, train=train)
