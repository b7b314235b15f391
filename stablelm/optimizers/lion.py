"""Lion: the sign of an interpolated momentum; one tensor of state."""

from dataclasses import dataclass
from typing import ClassVar

from stablelm.optimizers.interface import Elements, StateTensor, Update


@dataclass(frozen=True)
class LionUpdate(Update):
    """Chen et al. 2023, algorithm 2: u = sign(b1 m + (1 - b1) g), w -= lr (u + decay w), m = b2 m + (1 - b2) g."""

    name: ClassVar[str] = "lion"
    papers: ClassVar[tuple[str, ...]] = ("Chen et al., Symbolic Discovery of Optimization Algorithms, 2023",)
    backward_obstacle: ClassVar[str] = ""

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor()}

    def update(self, piece: Elements) -> None:
        (first, second), mean = piece.betas, piece.state["exp_avg"]
        direction = mean.lerp(piece.gradient, 1 - first).sign_()
        piece.weight.mul_(1 - piece.lr * piece.decay).sub_(direction, alpha=piece.lr)
        mean.lerp_(piece.gradient, 1 - second)
