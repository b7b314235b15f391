"""Loss, perplexity and bits per byte of a validation set, the same figures in any world size."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stablelm.data.validation import ValidationSet
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.model.targets import IGNORED

THIRDS = ("head", "middle", "tail")


@dataclass(frozen=True)
class Scores:
    """`loss` in nats a token, `tokens` predicted; `bits_per_byte`: None for text the tokenizer cannot restore.

    `by_frequency`: the loss of each third of the targets, by `thirds`; those that are empty are left out.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    by_frequency: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


def evaluate(
    engine: Engine,
    ranks: Ranks,
    data: ValidationSet,
    micro_batch_size: int,
    reached: Callable[[str], None] = lambda place: None,
) -> Scores:
    """Mean cross-entropy over the set's valid targets.

    `reached` is called before each micro-batch with its place, on all ranks alike; what it raises ends the evaluation.
    The set is cut into the same micro-batches in every world size and rank r takes those ≡ r mod W,
    so that only the order of a float64 sum can differ. Ranks without a micro-batch run an empty one,
    because a sharded model is called by all or by none.
    """
    targets = torch.as_tensor(data.targets)
    parts = _micro_batches(torch.as_tensor(data.tokens), targets, micro_batch_size)
    total, valid, third_of = 0.0, 0, thirds(targets)
    by_third = torch.zeros(2, len(THIRDS), dtype=torch.float64)  # sums of losses, and targets
    was_training = engine.module.training
    engine.module.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(parts), ranks.world_size):
                reached(f"micro-batch {first + 1} of {len(parts)}")
                index = first + ranks.rank
                part_tokens, part_targets = parts[min(index, len(parts) - 1)]
                if index >= len(parts):
                    part_targets = torch.full_like(part_targets, IGNORED)
                sums = engine.loss(part_tokens.to(engine.device), part_targets.to(engine.device))
                total += float(sums.cross_entropy)
                valid += int(sums.valid)
                by_third += _by_third(sums.each, part_targets, third_of)
    finally:
        engine.module.train(was_training)
    gathered = ranks.gather((total, valid, by_third.tolist()))
    total, valid = sum(t for t, _, _ in gathered), sum(v for _, v, _ in gathered)
    losses, counts = torch.tensor([part for *_, part in gathered], dtype=torch.float64).sum(dim=0).tolist()
    loss = total / max(1, valid)
    return Scores(
        loss=loss,
        bits_per_byte=bits_per_byte(loss, data.bytes_per_token),
        tokens=valid,
        by_frequency={name: sum_ / n for name, sum_, n in zip(THIRDS, losses, counts, strict=True) if n},
    )


def thirds(targets: Tensor) -> Tensor:
    """The third that each token belongs to, (tokens,) int64: 0 for the most frequent ones.

    Each holds about a third of the targets, in which tokens are counted, -100 left out; of equally frequent ones the
    lower number comes first.
    """
    counts = torch.bincount(targets[targets != IGNORED].flatten())
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    found = torch.empty_like(order)
    found[order] = (before * len(THIRDS) // counts.sum().clamp(min=1)).clamp(max=len(THIRDS) - 1)
    return found


def _by_third(each: Tensor, targets: Tensor, third_of: Tensor) -> Tensor:
    """Sums of losses and numbers of targets of a micro-batch by third, (2, 3) float64; each: (n,)."""
    valid = targets.flatten() != IGNORED
    place = third_of[targets.flatten()[valid]]
    losses = each.cpu().double()[valid]
    return torch.stack(
        [torch.bincount(place, weights=w, minlength=len(THIRDS)) for w in (losses, torch.ones_like(losses))]
    )


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Nats a token to bits a UTF-8 byte of the text, end-of-document tokens counted as tokens; None stays None."""
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token


def in_words(bits: float | None) -> str:
    """Bits per byte for a reader."""
    return "no bits per byte (the tokens do not give the text back)" if bits is None else f"bits per byte {bits:.4f}"


def _micro_batches(tokens: torch.Tensor, targets: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of exactly `rows` rows, the last one filled up: one shape serves a compiled model."""
    missing = -len(tokens) % rows
    tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
    targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORED)])
    return list(zip(tokens.split(rows), targets.split(rows), strict=True))
