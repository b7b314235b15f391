"""StableAdamW: AdamW whose rate falls for a tensor whose second moment is out of date."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stablelm.optimizers.interface import Elements, StateTensor, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StableAdamWUpdate(Update):
    """Wortsman et al. 2023 (Stable and low-precision training), algorithm 2.

    The averages are debiased by their constants, b (1 - b^(t-1)) / (1 - b^t). A tensor's rate is divided by
    max(1, RMS), RMS^2 the mean of g^2 / max(v, eps^2) over the tensor: AdaFactor's update clipping.
    """

    name: ClassVar[str] = "stable_adamw"
    papers: ClassVar[tuple[str, ...]] = (
        "Wortsman et al., Stable and low-precision training for large-scale vision-language models, 2023",
    )
    zero_obstacle: ClassVar[str] = "join the tensors over each of which it takes a mean"
    backward_obstacle: ClassVar[str] = ""

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor(), "exp_avg_sq": StateTensor()}

    def statistic(self, piece: Elements) -> "Tensor":
        share = piece.each(_new_share(piece.betas[1], piece.step))
        square = piece.gradient.square()
        renewed = piece.state["exp_avg_sq"] + (square - piece.state["exp_avg_sq"]) * share
        return square.div_(renewed.clamp_(min=piece.eps**2))

    def update(self, piece: Elements) -> None:
        assert piece.mean is not None
        mean, square = piece.state["exp_avg"], piece.state["exp_avg_sq"]
        first, second = (piece.each(_new_share(beta, piece.step)) for beta in piece.betas)
        mean.add_((piece.gradient - mean).mul_(first))
        square.add_(piece.gradient.square().sub_(square).mul_(second))
        rate = piece.each(piece.lr / piece.mean.sqrt().clamp(min=1))
        direction = mean / square.sqrt().add_(piece.eps)
        piece.weight.sub_(direction.add_(piece.weight, alpha=piece.decay).mul_(rate))


def _new_share(beta: float, step: "Tensor") -> "Tensor":
    """The share of the new value in a debiased average: 1 - b (1 - b^(t-1)) / (1 - b^t), which is 1 at t = 1."""
    return (1 - beta) / (1 - beta**step)
