"""Sophia-G: momentum divided by an estimate of the Hessian's diagonal, clipped element by element."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from stablelm.key import ABOVE_0, AT_LEAST_1, key
from stablelm.methods.roles import Refusal
from stablelm.optimizers.interface import CURVATURE, GRADIENT, Elements, StateTensor, Update


@dataclass(frozen=True)
class SophiaOptions:
    """Sophia-G's options"""

    every: int = key(10, "steps between estimates of the curvature", unit="steps", identity=True, range=AT_LEAST_1)
    gamma: float = key(
        0.05, "what multiplies the curvature: a larger one clips fewer elements", identity=True, range=ABOVE_0
    )


@dataclass(frozen=True)
class SophiaUpdate(Update):
    """Liu et al. 2023, algorithm 3 with the Gauss-Newton-Bartlett estimator (algorithm 2).

    w -= lr clip(m / max(gamma h, eps), 1). Every k steps h = b2 h + (1 - b2) B g^2, g the mean gradient of B tokens
    whose targets are drawn from the model's own distribution.
    """

    options: SophiaOptions = SophiaOptions()
    name: ClassVar[str] = "sophia"
    papers: ClassVar[tuple[str, ...]] = (
        "Liu et al., Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training, 2023",
    )
    zero_obstacle: ClassVar[str] = "reduce one gradient a step, and it needs a second one for the curvature"

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor(), "hessian": StateTensor()}

    def update(self, piece: Elements) -> None:
        (first, second), mean, hessian = piece.betas, piece.state["exp_avg"], piece.state["hessian"]
        mean.lerp_(piece.gradient, 1 - first)
        if piece.curvature is not None:
            hessian.lerp_(piece.curvature, 1 - second)
        direction = (mean / (hessian * self.options.gamma).clamp_(min=piece.eps)).clamp_(-1, 1)
        piece.weight.mul_(1 - piece.lr * piece.decay).sub_(direction, alpha=piece.lr)

    def passes(self, step: int) -> tuple[str, ...]:
        return (CURVATURE, GRADIENT) if (step - 1) % self.options.every == 0 else (GRADIENT,)

    def extra_passes(self) -> float:
        return 4 / 3 / self.options.every  # a forward pass to draw targets, then both

    def copies(self) -> int:
        return 1

    def refusals(self, config: Any) -> Iterator[Refusal]:
        if config.train.loss is not None:
            yield Refusal(
                ("train.optimizer", "train.loss"),
                f"train.loss={config.train.loss} is not the cross-entropy, whose Gauss-Newton matrix "
                "train.optimizer=sophia estimates; leave it out or use another optimizer",
            )
