"""AdamW with eps inside the root; the usual form, with eps outside, is torch's fused kernel (`engine.optimizers`)."""

from dataclasses import dataclass
from typing import ClassVar

from stablelm.optimizers.interface import Elements, StateTensor, Update


@dataclass(frozen=True)
class AdamWUpdate(Update):
    """Loshchilov and Hutter 2019, algorithm 2: m / (sqrt(v) + eps) of debiased averages, or m / sqrt(v + eps)."""

    eps_inside: bool = False
    name: ClassVar[str] = "adamw"
    papers: ClassVar[tuple[str, ...]] = (
        "Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015",
        "Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019",
    )
    backward_obstacle: ClassVar[str] = ""

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor(), "exp_avg_sq": StateTensor()}

    def update(self, piece: Elements) -> None:
        (first, second), gradient = piece.betas, piece.gradient
        mean, square = piece.state["exp_avg"], piece.state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square / piece.each(1 - second**piece.step)
        root = root.add_(piece.eps).sqrt_() if self.eps_inside else root.sqrt_().add_(piece.eps)
        piece.weight.mul_(1 - piece.lr * piece.decay)
        piece.weight.addcdiv_(mean / piece.each(1 - first**piece.step), root, value=-piece.lr)
