"""Pre-LN, the baseline that all other methods change, and the values of the axes that it has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import (
    AttentionGate,
    DepthDrop,
    Gains,
    Init,
    Maps,
    Method,
    Model,
    Placement,
    Reparam,
    Role,
    Shaping,
    Softmax,
    Stack,
    Stream,
    ValueMixing,
)


@dataclass(frozen=True)
class Residual(Stream):
    """x + f(x) (He et al. 2016)."""

    name: ClassVar[str] = "residual"


@dataclass(frozen=True)
class NoReparam(Reparam):
    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class NoShaping(Shaping):
    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class NoGate(AttentionGate):
    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class PlainSoftmax(Softmax):
    name: ClassVar[str] = "standard"


@dataclass(frozen=True)
class OwnValues(ValueMixing):
    name: ClassVar[str] = "own"

    def asked(self, model: Model) -> bool:
        return True


@dataclass(frozen=True)
class WholeMaps(Maps):
    name: ClassVar[str] = "whole"

    def asked(self, model: Model) -> bool:
        return True


@dataclass(frozen=True)
class OwnLayers(Stack):
    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class NoDrop(DepthDrop):
    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class NoGains(Gains):
    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class Xavier(Init):
    name: ClassVar[str] = "xavier"

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Glorot's std, query, key and value for each head, as in the vanilla models of Kedia et al., ICML 2024."""
        if role.kind in ("query", "key", "value"):
            return math.sqrt(2 / (shape[1] + model.d_model // model.n_heads))
        return glorot(shape)


def glorot(shape: Sequence[int]) -> float:
    """sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    return math.sqrt(2 / sum(shape))


@dataclass(frozen=True)
class FanIn(Init):
    name: ClassVar[str] = "fan_in"
    unit_variance: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """1 / sqrt(fan_in): keeps the variance of what comes in (LeCun et al. 1998)."""
        return shape[1] ** -0.5


VALUES = (
    Residual(),
    Placement("pre", before_body=True, final=True),
    Placement("none"),
    NoReparam(),
    NoShaping(),
    NoGate(),
    PlainSoftmax(),
    OwnValues(),
    WholeMaps(),
    OwnLayers(),
    NoDrop(),
    NoGains(),
    Xavier(),
    FanIn(),
)
DEFAULTS = {
    "stream": "residual",
    "placement": "pre",
    "norm": "layernorm",
    "embedding_norm": False,
    "init": "xavier",
    "reparam": "none",
    "activation": "gelu",
    "bias": False,
    "tie_embeddings": False,
    "stack": "plain",
    "depth_drop": "none",
    "gains": "none",
    "attention.position": "rope",
    "attention.qk_norm": False,
    "attention.logit_cap": 0.0,
    "attention.value_residual": False,
    "attention.low_rank": 0.0,
    "attention.value_maps": True,
    "attention.shaping": "none",
    "attention.gate": "none",
    "attention.softmax": "standard",
}
PRE_LN = Method(
    "pre_ln", "Xiong et al., On Layer Normalization in the Transformer Architecture, ICML 2020", DEFAULTS, VALUES
)
