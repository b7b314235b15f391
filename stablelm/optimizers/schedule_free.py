"""Schedule-free AdamW: gradients at y, between the iterate z and its average x; x is what is evaluated and exported."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.roles import Refusal
from stablelm.optimizers.interface import Elements, StateTensor, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScheduleFreeUpdate(Update):
    """Defazio et al. 2024, algorithm 1, as in the authors' AdamWScheduleFree with r = 0.

    The parameters are y = b1 x + (1 - b1) z. z takes AdamW's step without momentum, decayed by y; x is the average of z
    weighted by the square of the largest rate so far. x is never stored: x = (y - (1 - b1) z) / b1.
    """

    beta: float = 0.9
    name: ClassVar[str] = "schedule_free"
    papers: ClassVar[tuple[str, ...]] = ("Defazio et al., The Road Less Scheduled, 2024",)
    backward_obstacle: ClassVar[str] = ""
    rounds: ClassVar[bool] = False

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {
            "z": StateTensor(from_weights=True),
            "exp_avg_sq": StateTensor(),
            "lr_max": StateTensor(single=True),
            "weight_sum": StateTensor(single=True),
        }

    def update(self, piece: Elements) -> None:
        first, second = piece.betas
        y, z, square = piece.weight, piece.state["z"], piece.state["exp_avg_sq"]
        largest = piece.state["lr_max"].clamp_(min=piece.lr)
        total = piece.state["weight_sum"].add_(largest.square())
        # Before the first rate above zero nothing has moved, and any share will do.
        share = piece.each(largest.square() / total.clamp(min=1e-38))
        square.mul_(second).addcmul_(piece.gradient, piece.gradient, value=1 - second)
        direction = piece.gradient / (square / piece.each(1 - second**piece.step)).sqrt_().add_(piece.eps)
        direction.add_(y, alpha=piece.decay)
        y.add_((z - y).mul_(share))
        y.add_(direction * (piece.lr * (first * (1 - share) - 1)))
        z.sub_(direction, alpha=piece.lr)

    def evaluated(self, weight: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return weight.lerp(state["z"], 1 - 1 / self.beta)

    def evaluation_state(self) -> tuple[str, ...]:
        return ("z",)

    def refusals(self, config: Any) -> Iterator[Refusal]:
        train = config.train
        if train.schedule != "constant":
            yield Refusal(
                ("train.optimizer", "train.schedule"),
                f"train.schedule={train.schedule} contradicts train.optimizer=schedule_free, whose average takes the "
                "place of a falling rate; set train.schedule=constant",
            )
        if train.betas[0] == 0:
            yield Refusal(
                ("train.optimizer", "train.betas"),
                f"train.betas={list(train.betas)} leaves train.optimizer=schedule_free no average to evaluate; use a "
                "first constant above 0, such as 0.9",
            )
