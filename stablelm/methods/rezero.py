"""ReZero: branches with a learned gain that starts at zero (Bachlechner et al., UAI 2021)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.axes import Added, Array, Method, Model, Refusal, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class ReZeroStream(Stream):
    """x + a f(x), a (1,) for each sub-layer."""

    name: ClassVar[str] = "rezero"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("gain", np.zeros(1)),)

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"learned_gain": True}

    def branch_at_start(self, model: Model) -> float:
        return 0.0

    def plain_value(self, added: Added) -> Array:
        return np.ones(1)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        return super().write(chunks, branch * added["gain"].to(branch.dtype), added)

    def trained_gains(self, model: Model, sublayer: int, added: "Mapping[str, Tensor]") -> tuple[float, float]:
        return 1.0, added["gain"].item()

    def refusals(self, model: Model) -> Iterable[Refusal]:
        return sized_twice(model)


def sized_twice(model: Model) -> Iterable[Refusal]:
    """Of streams with a learned gain on the branch."""
    if any(at.on_branch for at in model.axes.placement.used()):
        yield Refusal(
            ("model.stream", "model.placement"),
            "a norm on the branch and a learned gain that starts at zero both set the branch's size; "
            "use model.placement=none or pre, or model.stream=residual",
        )


REZERO = Method(
    "rezero",
    "Bachlechner et al., ReZero is All You Need: Fast Convergence at Large Depth, UAI 2021",
    {"stream": "rezero", "placement": "none"},
    (ReZeroStream(),),
)
