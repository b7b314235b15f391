"""SAM and LookSAM: the gradient at weights moved uphill, given to another optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stablelm.key import ABOVE_0, AT_LEAST_1, Range, key
from stablelm.methods.roles import Refusal
from stablelm.optimizers.adamw import AdamWUpdate
from stablelm.optimizers.interface import ASCENDED, GRADIENT, Elements, StateTensor, Update, WholeMatrices

if TYPE_CHECKING:
    from torch import Tensor

# ruff: noqa: RUF009 - key() makes dataclass fields
NORM_EPS = 1e-12
DIRECTION = "sam_direction"


@dataclass(frozen=True)
class SamOptions:
    """Options of sam and looksam"""

    base: Literal["adamw", "lion", "stable_adamw", "muon"] = key(
        "adamw", "the optimizer that gets the gradient", identity=True
    )
    rho: float = key(0.05, "how far the weights are moved: the norm of the move", identity=True, range=ABOVE_0)
    every: int = key(5, "looksam: steps between those with two passes", unit="steps", identity=True, range=AT_LEAST_1)
    alpha: float = key(
        0.7,
        "looksam: the length of the direction that other steps add, as a share of the gradient's",
        identity=True,
        range=Range("at least 0", lambda v: v >= 0),
    )


@dataclass(frozen=True)
class SamUpdate(Update):
    """Foret et al. 2021, algorithm 1: the gradient at w + rho g / |g|, norms over all parameters and the whole batch.

    LookSAM (Liu et al. 2022, algorithm 2) takes two passes every k steps and keeps the part of the second gradient
    that is orthogonal to the first, v; the steps between use g + alpha |g| / |v| v.
    """

    options: SamOptions = SamOptions()
    base: Update = AdamWUpdate()
    looks: bool = False
    name: ClassVar[str] = "sam"
    papers: ClassVar[tuple[str, ...]] = (
        "Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021",
        "Ilbert et al., SAMformer: Unlocking the Potential of Transformers in Time Series Forecasting, 2024",
        "Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization (LookSAM), 2022",
    )
    zero_obstacle: ClassVar[str] = "are not the weights of the passes, which it moves between two passes"
    rounds: ClassVar[bool] = False

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return self.base.states(hidden=hidden) | ({DIRECTION: StateTensor()} if self.looks else {})

    def update(self, piece: Elements) -> None:
        self.base.update(piece)

    def statistic(self, piece: Elements) -> "Tensor | None":
        return self.base.statistic(piece)

    def whole(self, *, hidden: bool) -> WholeMatrices | None:
        return self.base.whole(hidden=hidden)

    def passes(self, step: int) -> tuple[str, ...]:
        twice = not self.looks or (step - 1) % self.options.every == 0
        return (GRADIENT, ASCENDED) if twice else (GRADIENT,)

    def extra_passes(self) -> float:
        return 1 / self.options.every if self.looks else 1.0

    def copies(self) -> int:
        return 2 if self.looks else 1

    def refusals(self, config: Any) -> Iterator[Refusal]:
        yield from self.base.refusals(config)
