"""Simplified blocks: no skip around attention, no value and no output map (He & Hofmann, ICLR 2024).

Heads give (alpha I + beta softmax(q k / sqrt(d_head)) - gamma C) x_h of their slice x_h of what the sub-layer reads,
with C the softmax of zero logits and learned alpha, beta, gamma of each head that start at 1 (eq. 7). Queries start at
zero, so that attention starts as the identity. In SAS the feed-forward keeps its skip, in SAS-P it reads what
attention reads and both are added without any skip (sections 4.1 to 4.3); its output has a learned gain that starts
small (section 4.1; 0.1 at 18 layers in the released configurations).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import ABOVE_0, key
from stablelm.methods.axes import Added, Maps, Method, MethodOptions, Model, Refusal, Stream
from stablelm.methods.pre_ln import FanIn
from stablelm.methods.shaped_attention import Centred

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

HE = "He & Hofmann, Simplifying Transformer Blocks, ICLR 2024"
DEPTH = 18
"""Layers of the models for which the paper gives the feed-forward's gain."""


@dataclass(frozen=True)
class SimplifiedOptions(MethodOptions):
    """Options of stream: simplified and simplified_parallel."""

    SECTION: ClassVar[str] = "simplified"

    gain: float = key(
        0.1,
        f"start of the feed-forward's gain at {DEPTH} layers; it falls with sqrt(n_layers)",
        identity=True,
        range=ABOVE_0,
    )


@dataclass(frozen=True)
class Simplified(Stream):
    """f(x) after attention, x + b f(x) after the feed-forward, b (1,) learned."""

    name: ClassVar[str] = "simplified"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("gain", np.full(1, self._gain(model))),) if sublayer % 2 else ()

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        if "gain" not in added:
            return (branch.to(chunks[0].dtype),)
        return super().write(chunks, branch * added["gain"].to(branch.dtype), added)

    def start_gains(self, model: Model, sublayer: int) -> tuple[float, float]:
        return (1.0, self._gain(model)) if sublayer % 2 else (0.0, 1.0)

    def _gain(self, model: Model) -> float:
        return model.option(SimplifiedOptions).gain * (DEPTH / model.n_layers) ** 0.5

    def refusals(self, model: Model) -> Iterable[Refusal]:
        axes = model.axes
        if not axes.shaping.combines:
            yield Refusal(
                ("model.stream", "model.attention.shaping"),
                "without a skip around it, attention that starts uniform makes all tokens equal within a few layers; "
                "use model.attention.shaping=simplified or shaped, or model.stream=residual",
            )
        if axes.placement.on_branch or axes.placement.after_write:
            yield Refusal(
                ("model.stream", "model.placement"),
                "a norm on the branch undoes the small gain with which the feed-forward starts, and one on the stream "
                "its skip; use model.placement=pre or none",
            )
        if axes.maps.has_values and axes.init.sizes_branches:
            yield Refusal(
                ("model.stream", "model.init"),
                "this initialisation sizes branches for a stream with skips; use model.init=zero_query or fan_in",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"attention_skip": False, "learned_gain": True, "parallel": self.parallel}

    def export_obstacle(self, model: Model) -> str:
        return "its attention has no skip around it, which every standard architecture has"

    def import_obstacle(self, model: Model) -> str:
        return "its attention has no skip around it, and a plain model's has one"


@dataclass(frozen=True)
class SimplifiedParallel(Simplified):
    """f_attention(x) + b f_feedforward(x)."""

    name: ClassVar[str] = "simplified_parallel"
    parallel: ClassVar[bool] = True


@dataclass(frozen=True)
class SimplifiedAttention(Centred):
    name: ClassVar[str] = "simplified"

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        return tuple(Added(name, np.ones(model.n_heads)) for name in ("own_gain", "average_gain", "centre_gain"))

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"identity_heads": True, "learned_identity": True}

    def combine(self, own: "Tensor", averaged: "Tensor", centre: "Tensor", added: "Mapping[str, Tensor]") -> "Tensor":
        alpha, beta, gamma = (
            added[name].to(own.dtype)[:, None, None] for name in ("own_gain", "average_gain", "centre_gain")
        )
        return alpha * own + (beta * averaged - gamma * centre)


@dataclass(frozen=True)
class NoValues(Maps):
    name: ClassVar[str] = "no_values"
    has_values: ClassVar[bool] = False

    def asked(self, model: Model) -> bool:
        return model.attention.value_maps is False

    def rank(self, model: Model) -> int | None:
        return max(1, round(model.attention.low_rank * model.d_model)) if model.attention.low_rank else None

    def refusals(self, model: Model) -> Iterable[Refusal]:
        axes = model.axes
        if axes.stream.grows:
            yield Refusal(
                ("model.attention.value_maps", "model.stream"),
                "without a value and an output map a branch is as wide as what it reads, and this stream's are not; "
                "use model.attention.value_maps=true",
            )
        if axes.init.sizes_branches:
            yield Refusal(
                ("model.attention.value_maps", "model.init"),
                "this initialisation sizes branches by the value and output maps, which are not there; "
                "use model.init=zero_query, fan_in, xavier or gpt2",
            )
        if model.kv_heads not in (None, model.n_heads):
            yield Refusal(
                ("model.attention.value_maps", "model.kv_heads"),
                "without a value map each head has its own slice of what the sub-layer reads; use model.kv_heads=null",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its attention has no value and output maps"

    def import_obstacle(self, model: Model) -> str:
        return "its attention has no value and output maps, which a plain model has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"value_maps": False}


@dataclass(frozen=True)
class ZeroQuery(FanIn):
    name: ClassVar[str] = "zero_query"

    def starts_at_zero(self, kind: str) -> bool:
        return kind == "query"

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.attention.qk_norm:
            yield Refusal(
                ("model.init", "model.attention.qk_norm"),
                "queries start at zero, which a norm cannot scale; use model.attention.qk_norm=false",
            )


DEFAULTS = {
    "stream": "simplified",
    "init": "zero_query",
    "activation": "relu",
    "attention.shaping": "simplified",
    "attention.value_maps": False,
}
SAS = Method(
    "sas",
    HE,
    DEFAULTS,
    (Simplified(), SimplifiedParallel(), SimplifiedAttention(), NoValues(), ZeroQuery()),
    (SimplifiedOptions,),
)
SAS_P = Method("sas_p", HE, {**DEFAULTS, "stream": "simplified_parallel"})
