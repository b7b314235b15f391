"""SkipInit: no norms, and a learned scalar at the end of each branch (De & Smith, NeurIPS 2020)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import key
from stablelm.methods.axes import Added, Array, Method, MethodOptions, Model, Refusal, Stream
from stablelm.methods.rezero import sized_twice

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class SkipInitOptions(MethodOptions):
    """Options of stream: skipinit."""

    SECTION: ClassVar[str] = "skipinit"

    start: float = key(
        0.0, "start of each branch's scalar; the paper: 0, or at most one over the root of their number", identity=True
    )


@dataclass(frozen=True)
class SkipInit(Stream):
    """x + a f(x), a (1,) for each sub-layer."""

    name: ClassVar[str] = "skipinit"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("gain", np.full(1, model.option(SkipInitOptions).start)),)

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"learned_gain": 1}

    def branch_at_start(self, model: Model) -> float:
        return model.option(SkipInitOptions).start

    def plain_value(self, added: Added) -> Array:
        return np.ones(1)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        return super().write(chunks, branch * added["gain"].to(branch.dtype), added)

    def trained_gains(self, model: Model, sublayer: int, added: "Mapping[str, Tensor]") -> tuple[float, float]:
        return 1.0, added["gain"].item()

    def refusals(self, model: Model) -> Iterable[Refusal]:
        return sized_twice(model)


SKIPINIT = Method(
    "skipinit",
    "De & Smith, Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks, "
    "NeurIPS 2020",
    {"stream": "skipinit", "placement": "none", "init": "fan_in", "activation": "relu", "bias": True},
    (SkipInit(),),
    (SkipInitOptions,),
)
