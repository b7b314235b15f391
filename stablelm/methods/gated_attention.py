"""Gated attention: a sigmoid of what the sub-layer reads multiplies the heads' output (Qiu et al., NeurIPS 2025).

With the input x of the sub-layer after its norm and head h's average o_h of values, head h gives o_h * sigmoid(W_h x),
one number for the head or one for each of its features, before the output map (section 2.2, position G1). Bondarenko et
al., NeurIPS 2023, have the gate of a head with a bias, which starts at logit(pi) (section 4.2; the released code's
`attn_gate_linear_all_features` reads all features of x, as here).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import Range, key
from stablelm.methods.axes import Added, AttentionGate, Method, MethodOptions, Model, Refusal
from stablelm.methods.sizes import d_head
from stablelm.theory.moments import gate_function

if TYPE_CHECKING:
    from torch import Tensor

QIU = "Qiu et al., Gated Attention for Large Language Models, NeurIPS 2025"
BONDARENKO = "Bondarenko et al., Quantizable Transformers, NeurIPS 2023"
SHARE = Range("above 0 and below 1", lambda v: 0 < v < 1)


@dataclass(frozen=True)
class GateOptions(MethodOptions):
    """Options of model.attention.gate: headwise and elementwise."""

    SECTION: ClassVar[str] = "gate"

    start: float | None = key(
        None,
        "what gates are at the start for an input of zero, by their bias; None: 1/2, with a bias if model.bias",
        identity=True,
        range=SHARE,
    )


class SigmoidGate(AttentionGate):
    """What both kinds of gate have in common."""

    def has_bias(self, model: Model) -> bool:
        """Whether something learned is added to its logits."""
        return bool(model.bias) or model.option(GateOptions).start is not None

    def logit_mean(self, model: Model) -> float:
        start = model.option(GateOptions).start
        return 0.0 if start is None else math.log(start / (1 - start))

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        if not self.has_bias(model):
            return ()
        return (Added("gate_bias", np.full(self.width(model), self.logit_mean(model))),)

    def apply(self, mixed: "Tensor", logits: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        import torch

        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if "gate_bias" in added:
            logits = logits + added["gate_bias"].to(logits.dtype)
        gates = logits.sigmoid().to(mixed.dtype)
        return mixed * gates.unflatten(-1, (mixed.shape[-2], -1))

    def moments(self, kept: float, common: float, model: Model, variance: float, r: float) -> tuple[float, float]:
        """Products of two Gaussian inputs' sigmoids, for rows of variance 1 / fan_in, multiply values' products."""
        gate = gate_function(self.logit_mean(model))
        covariance = float(gate.dual(variance, r * variance, variance))
        return kept * float(gate.second_moment(variance)), common * covariance

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"gate_rows": self.width(model), "gate_bias": self.has_bias(model)}

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.axes.shaping.active:
            yield Refusal(
                ("model.attention.gate", "model.attention.shaping"),
                "a gate takes half of what the fixed attention of a stack without skips gives, at every layer; "
                "use model.attention.gate=none",
            )


@dataclass(frozen=True)
class Headwise(SigmoidGate):
    name: ClassVar[str] = "headwise"

    def width(self, model: Model) -> int:
        return model.n_heads


@dataclass(frozen=True)
class Elementwise(SigmoidGate):
    name: ClassVar[str] = "elementwise"

    def width(self, model: Model) -> int:
        return model.n_heads * d_head(model)


GATED_ATTENTION = Method(
    "gated_attention", QIU, {"attention.gate": "elementwise"}, (Headwise(), Elementwise()), (GateOptions,)
)
