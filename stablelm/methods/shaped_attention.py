"""Shaped attention: the identity plus what softmax adds to uniform attention (Noci et al., NeurIPS 2023).

Heads give (I + softmax(q k / tau) - C) v, where C is the softmax of zero logits, with tau = tau_0 sqrt(d_model d_head)
for queries and keys of unit variance (eqs. 5 and 6), so that attention departs from the identity by O(1 / sqrt(d)). The
activation is a leaky relu whose slopes are 1 + O(1 / sqrt(d)) (Li et al., NeurIPS 2022, there c+ = 0), and the stream
is lambda x + gamma f(x) with lambda^2 + gamma^2 = 1 (eq. 11).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.key import ABOVE_0, Range, key
from stablelm.methods.activations import UnitLeakyRelu
from stablelm.methods.axes import Method, MethodOptions, Model, Refusal, Shaping, Stream

if TYPE_CHECKING:
    from torch import Tensor

NOCI = "Noci et al., The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit, NeurIPS 2023"
SHARE = Range("above 0 and below 1", lambda v: 0 < v < 1)


@dataclass(frozen=True)
class ShapedOptions(MethodOptions):
    """Options of shaped attention, of the shaped relu and of the balanced stream."""

    SECTION: ClassVar[str] = "shaped"

    tau: float = key(
        1.0, "logits are divided by it times sqrt(d_model), beside sqrt(d_head)", identity=True, range=ABOVE_0
    )
    slope: float = key(
        1.0,
        "the shaped relu's negative side has slope 1 - this / sqrt(d_model), at least 0",
        identity=True,
        range=Range("at least 0", lambda v: v >= 0),
    )
    gamma: float = key(
        0.5**0.5, "gain of a branch of the balanced stream; the skip has sqrt(1 - gamma^2)", identity=True, range=SHARE
    )


class Centred(Shaping):
    """The identity, plus the weights of attention, minus those of zero queries."""

    combines: ClassVar[bool] = True

    def combine(self, own: "Tensor", averaged: "Tensor", centre: "Tensor", added: "Mapping[str, Tensor]") -> "Tensor":
        return own + (averaged - centre)

    def moments(self, kept: float, common: float, correlation: float) -> tuple[float, float]:
        """Those of the values: what attention adds to the identity is small at the start."""
        return 1.0, correlation

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"identity_heads": True}


@dataclass(frozen=True)
class Shaped(Centred):
    name: ClassVar[str] = "shaped"

    def logit_factor(self, model: Model) -> float:
        """1 / (tau_0 sqrt(d_model)), beside the 1 / sqrt(d_head) of the initialisation."""
        return 1 / (model.option(ShapedOptions).tau * math.sqrt(model.d_model))


@dataclass(frozen=True)
class ShapedRelu(UnitLeakyRelu):
    """Its slope nears 1 as the model gets wide."""

    name: ClassVar[str] = "shaped_relu"

    def at(self, model: Model) -> "ShapedRelu":
        return replace(self, slope=max(0.0, 1 - model.option(ShapedOptions).slope / math.sqrt(model.d_model)))


@dataclass(frozen=True)
class Balanced(Stream):
    """sqrt(1 - gamma^2) x + gamma f(x)."""

    name: ClassVar[str] = "balanced"

    def gains(self, model: Model) -> tuple[float, float]:
        gamma = model.option(ShapedOptions).gamma
        return math.sqrt(1 - gamma**2), gamma

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.axes.placement.after_write:
            yield Refusal(
                ("model.stream", "model.placement"),
                "a norm on the stream undoes the gain of its skip; use model.placement=none or pre, or "
                "model.stream=residual",
            )


SHAPED_ATTENTION = Method(
    "shaped_attention",
    NOCI,
    {
        "stream": "balanced",
        "placement": "none",
        "init": "fan_in",
        "activation": "shaped_relu",
        "attention.shaping": "shaped",
    },
    (Shaped(), ShapedRelu(), Balanced()),
    (ShapedOptions,),
)
