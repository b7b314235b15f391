"""One optimizer step: micro-batches in, one update out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.engine.interface import Engine, StepResult
from stablelm.engine.optimizers import refused
from stablelm.engine.ranks import Ranks
from stablelm.model.devices import to_device
from stablelm.model.targets import IGNORED
from stablelm.optimizers.interface import CURVATURE, GRADIENT
from stablelm.seeds import seed_from


def train_step(
    engine: Engine,
    ranks: Ranks,
    tokens: Tensor,
    targets: Tensor,
    *,
    step: int,
    lr: float,
    seed: int,
    micro: int,
    largest_norm: float = math.inf,
    loss_factor: float = 1.0,
    mark: Callable[[str, str], None] = lambda phase, place: None,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Runs step number `step` on this rank's (rows, seq) batch, `micro` rows at a time.

    Every micro-batch's summed loss is divided by the valid targets of all ranks and micro-batches,
    so that accumulation and world size do not change the gradient. If any micro-batch's loss or the gradient norm is
    not finite, or the norm exceeds `largest_norm`, no rank updates. `loss_factor` is for fault injection; `mark` is
    called with each phase and place that begins, `before_update` once all gradients are there. The host waits for the
    GPU nowhere, but where `engine.offload` has it make the update.
    """
    mark("forward", "target counts")
    boundaries = [engine.module.boundaries(part, engine.device) for part in tokens.split(micro)]
    tokens, targets = to_device(tokens, engine.device), to_device(targets, engine.device)
    valid = (targets != IGNORED).sum()
    valid_global = valid.clone()
    if ranks.world_size > 1:
        dist.all_reduce(valid_global)
    valid_global = valid_global.clamp(min=1)
    parts = list(map(_MicroBatch, tokens.split(micro), targets.split(micro), boundaries))
    passes = _Passes(engine, ranks, step, seed, loss_factor, mark, parts, valid_global)
    engine.begin(lr)
    sums = {kind: passes.run(kind) for kind in engine.passes(step)}
    if before_update is not None:
        mark("backward", "observe.metrics")
        before_update()
    mark("update", "")
    norm = engine.step(lr, largest_norm=largest_norm)
    cross_entropy, objective = sums[GRADIENT]
    return StepResult(cross_entropy, valid, norm, refused(norm, largest_norm), objective)


class _MicroBatch(NamedTuple):
    tokens: Tensor
    targets: Tensor
    boundaries: Tensor | None


@dataclass(frozen=True)
class _Passes:
    """What every pass of a step over its micro-batches reads; `valid`: the targets of all ranks and micro-batches."""

    engine: Engine
    ranks: Ranks
    step: int
    seed: int
    loss_factor: float
    mark: Callable[[str, str], None]
    parts: Sequence[_MicroBatch]
    valid: Tensor

    def run(self, kind: str) -> Tensor:
        """Leaves a pass's gradients; the sums of cross-entropy and objective, (2,)."""
        engine = self.engine
        engine.begin_pass(kind)
        dtype = torch.float64 if engine.device.type == "cpu" else torch.float32
        found = torch.zeros(2, dtype=dtype, device=engine.device)
        factors = engine.module.branch_factors(self.seed, self.step)
        for index, part in enumerate(self.parts):
            place, last = f"micro-batch {index + 1} of {len(self.parts)}", index == len(self.parts) - 1
            self.mark("forward", place)
            self._seed(index)
            targets = self._drawn(index) if kind == CURVATURE else part.targets
            sums = engine.loss(part.tokens, targets, last=last, boundaries=part.boundaries, factors=factors)
            if self.loss_factor != 1.0:
                changed = {name: getattr(sums, name) * self.loss_factor for name in ("total", "cross_entropy")}
                sums = sums._replace(**changed)
            # NaN if this loss is not finite: then every rank's gradient norm becomes NaN, and all skip the update.
            nan_if_bad = 1 + 0 * sums.total.detach()
            self.mark("backward", place)
            engine.backward(sums.total / self.valid * nan_if_bad, last=last)
            found += torch.stack([sums.cross_entropy, sums.objective])
        engine.end_pass(kind, self.valid)
        return found

    def _seed(self, index: int) -> None:
        seed_dropout(self.seed, self.step, index, self.ranks.rank)

    def _drawn(self, index: int) -> Tensor:
        """Targets that the model draws in place of a micro-batch's own."""
        tokens, targets, boundaries = self.parts[index]
        first = sum(len(part.tokens) for part in self.parts[:index])
        draws = draws_of(self.seed, self.step, range(first, first + len(tokens)), self.ranks, tokens.shape[1])
        drawn = self.engine.drawn(tokens, to_device(draws, self.engine.device), boundaries=boundaries)
        self._seed(index)
        return torch.where(targets == IGNORED, IGNORED, drawn)


def draws_of(seed: int, step: int, rows: range, ranks: Ranks, seq: int) -> Tensor:
    """Numbers (rows, seq) in [0, 1) for targets that are drawn, the same for a row in any world size."""
    found = []
    for row in rows:
        generator = torch.Generator().manual_seed(seed_from("targets", seed, step, row * ranks.world_size + ranks.rank))
        found.append(torch.rand(seq, generator=generator, dtype=torch.float64))
    return torch.stack(found)


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Restarts torch's generators from what identifies the micro-batch: a resumed run draws the same masks."""
    torch.manual_seed(seed_from("dropout", seed, step, micro_batch, rank))
