"""One optimizer step: micro-batches in, one update out."""

import math
from collections.abc import Callable

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
    parts = list(zip(tokens.split(micro), targets.split(micro), strict=True))
    dtype = torch.float64 if engine.device.type == "cpu" else torch.float32
    cross_entropy, objective = torch.zeros(2, dtype=dtype, device=engine.device)
    engine.begin(lr)
    for kind in engine.passes(step):
        engine.begin_pass(kind)
        for index, (part_tokens, part_targets) in enumerate(parts):
            part = f"micro-batch {index + 1} of {len(parts)}"
            mark("forward", part)
            seed_dropout(seed, step, index, ranks.rank)
            last = index == len(parts) - 1
            if kind == CURVATURE:
                rows = range(index * micro, index * micro + len(part_tokens))
                draws = to_device(draws_of(seed, step, rows, ranks, tokens.shape[1]), engine.device)
                own = engine.drawn(part_tokens, draws, boundaries=boundaries[index])
                part_targets = torch.where(part_targets == IGNORED, IGNORED, own)
                seed_dropout(seed, step, index, ranks.rank)
            drawn = {"boundaries": boundaries[index], "factors": engine.module.branch_factors(seed, step, index)}
            sums = engine.loss(part_tokens, part_targets, last=last, **drawn)
            if loss_factor != 1.0:
                sums = sums._replace(total=sums.total * loss_factor, cross_entropy=sums.cross_entropy * loss_factor)
            # NaN if this loss is not finite: then every rank's gradient norm becomes NaN, and all skip the update.
            nan_if_bad = 1 + 0 * sums.total.detach()
            mark("backward", part)
            engine.backward(sums.total / valid_global * nan_if_bad, last=last)
            if kind == GRADIENT:
                cross_entropy += sums.cross_entropy
                objective += sums.objective
        engine.end_pass(kind, valid_global)
    if before_update is not None:
        mark("backward", "observe.metrics")
        before_update()
    mark("update", "")
    norm = engine.step(lr, largest_norm=largest_norm)
    return StepResult(cross_entropy, valid, norm, refused(norm, largest_norm), objective)


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
