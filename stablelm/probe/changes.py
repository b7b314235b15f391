"""Changes of all weights under which the probe passes through the model again: random ones, and an optimizer's first.

How far a small random change moves the output is the sensitivity of Davis et al. (Catformer, ICML 2021), whose theory
is `theory.sensitivity`. How far the first steps move it says what the configured rate does to this model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig, TrainConfig
from stablelm.methods.axes import MATRICES
from stablelm.model.initialise import initial_value, role_of
from stablelm.seeds import seed_from
from stablelm.train.schedule import learning_rate

Change = Callable[[str, Tensor], Tensor | None]
"""What is added to a parameter of that name and value; None: nothing."""
RELATIVE = 1e-3
"""Size of the random change, relative to the weights: small enough for the limit, large enough for fp32."""
STEPS = 10
"""Steps of training whose rates make the size of the update."""


@dataclass(frozen=True)
class FirstUpdate:
    """The first update of Adam, as large as the rates of the first `STEPS` steps together.

    Adam's first step moves every parameter by its rate along g / (|g| + eps) (Kingma & Ba 2015, algorithm 1 at t = 1).
    """

    model: ModelConfig
    rate: float
    eps: float

    @classmethod
    def of(cls, model: ModelConfig, train: TrainConfig) -> "FirstUpdate":
        """Of a resolved configuration."""
        return cls(model, sum(learning_rate(step, train) for step in range(1, STEPS + 1)), train.eps)

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """What the rate multiplies, negative, float16; `gradient`: of the mean loss to the parameter of that name."""
        rates = self.model.axes.init.rates(self.model, in_layer=name.startswith("layers."), matrix=gradient.ndim == 2)
        return (-rates.lr * gradient / (gradient.abs() + self.eps * rates.eps)).half()


@dataclass(frozen=True)
class Growth:
    """What the first update makes of the output, all tokens together.

    `output_change`: length of the change of what the head sees, relative to its length before; `stream_variance`:
    factor by which the stream's variance at the end grows; `token_correlation`: of the stream at the end after it;
    `loss`: after it, nats.
    """

    output_change: float
    stream_variance: float
    token_correlation: float
    loss: float


def independent_copies(model: ModelConfig, seed: int) -> Change:
    """Adds to every matrix of the layers an independent draw of itself, `RELATIVE` times as large."""

    drawn = {*MATRICES, *(added.name for added in model.axes.stream.in_sublayer(model, 0) if added.std)}

    def change(name: str, value: Tensor) -> Tensor | None:
        role = role_of(name)
        if role.layer is None or role.kind not in drawn or value.ndim != 2:
            return None
        draw = initial_value(name, role, tuple(value.shape), model, seed_from("sensitivity", seed))
        return RELATIVE * draw.to(value.dtype)

    return change


def taken(update: FirstUpdate, directions: dict[str, Tensor]) -> Change:
    """Adds the update along the directions by name."""

    def change(name: str, value: Tensor) -> Tensor | None:
        return update.rate * directions[name].to(value.dtype) if name in directions else None

    return change


def relative_change(before: Tensor, after: Tensor) -> float:
    """|after - before|^2 / |before|^2 over all entries."""
    squares = torch.linalg.vector_norm(before, dtype=torch.float64).square()
    return float(torch.linalg.vector_norm(after - before, dtype=torch.float64).square() / squares)
