"""Value-SkipInit: a stack without skips around attention, whose matrix starts as the identity (He et al., ICLR 2023).

Heads give (alpha I + beta softmax(...)) v with learned alpha and beta of each layer, 1 and 0 at the start (quoted as
eq. 4 by He & Hofmann, ICLR 2024). A token's own values stand in for the skip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.axes import Added, Method, Model, Shaping
from stablelm.methods.e_spa import HE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ValueSkip(Shaping):
    name: ClassVar[str] = "value_skip"
    replaces_skip: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    centres: ClassVar[bool] = False
    average_at_start: ClassVar[float] = 0.0

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        return Added("own_gain", np.ones(1)), Added("average_gain", np.zeros(1))

    def combine(self, own: "Tensor", averaged: "Tensor", centre: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        return added["own_gain"].to(own.dtype) * own + added["average_gain"].to(own.dtype) * averaged

    def moments(self, kept: float, common: float, correlation: float) -> tuple[float, float]:
        return 1.0, correlation

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"value_gains": True}


VALUE_SKIPINIT = Method(
    "value_skipinit",
    HE,
    {
        "stream": "skipless",
        "placement": "none",
        "init": "orthogonal",
        "activation": "tailored",
        "attention.shaping": "value_skip",
    },
    (ValueSkip(),),
)
