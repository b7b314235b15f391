"""Softmax that may attend to nothing: with one more term in its denominator, or with weights clipped at 0.

`off_by_one`: e^x_j / (1 + sum_k e^x_k) (Miller 2023, "Attention is off by one"). `sink`: a learned logit s_h of each
head in place of the 1's, e^x_j / (e^s_h + sum_k e^x_k), as in gpt-oss (OpenAI 2025). Both are what softmax gives beside
a key without a value. `clipped`: clip((zeta - gamma) softmax(x) + gamma, 0, 1) with zeta >= 1 and gamma = -alpha / T
(Bondarenko et al., NeurIPS 2023, eq. 4 and section 5.2), T the longest sequence, so that it is the same at any length.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import Range, key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, Refusal, Softmax
from stablelm.methods.gated_attention import BONDARENKO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClippedOptions(MethodOptions):
    """Options of model.attention.softmax: clipped."""

    SECTION: ClassVar[str] = "clipped"

    zeta: float = key(
        1.0,
        "weights are stretched up to it before they are clipped; at least 1",
        identity=True,
        range=Range("at least 1", lambda v: v >= 1),
    )
    alpha: float = key(
        4.0,
        "weights below about alpha / max_seq_len become 0: gamma = -alpha / max_seq_len",
        identity=True,
        range=Range("at least 0", lambda v: v >= 0),
    )


class WithNull(Softmax):
    """What both kinds with one more term in the denominator have in common."""

    null_at_start: ClassVar[float | None] = 0.0

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"null_key": True}

    def refusals(self, model: Model) -> Iterable[Refusal]:
        yield from _refusals(model)


def _refusals(model: Model) -> Iterable[Refusal]:
    if model.axes.shaping.active:
        yield Refusal(
            ("model.attention.softmax", "model.attention.shaping"),
            "the fixed attention of a stack without skips is solved for weights that sum to 1; "
            "use model.attention.softmax=standard",
        )


@dataclass(frozen=True)
class OffByOne(WithNull):
    name: ClassVar[str] = "off_by_one"

    def null_logits(self, heads: int, added: Mapping[str, "Tensor"], like: "Tensor") -> "Tensor":
        import torch

        return like.new_zeros(heads, dtype=torch.promote_types(like.dtype, torch.float32))


@dataclass(frozen=True)
class LearnedSink(WithNull):
    name: ClassVar[str] = "sink"

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        return (Added("sink", np.zeros(model.n_heads)),)

    def null_logits(self, heads: int, added: Mapping[str, "Tensor"], like: "Tensor") -> "Tensor":
        return added["sink"]

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"null_key": True, "learned_null": True}


@dataclass(frozen=True)
class Clipped(Softmax):
    name: ClassVar[str] = "clipped"

    def theory_gap(self, model: Model) -> str:
        return "which attention weights are clipped depends on the largest logits of each row, which are not known"

    def clip(self, model: Model) -> tuple[float, float]:
        options = model.option(ClippedOptions)
        assert model.max_seq_len is not None
        return options.zeta, -options.alpha / model.max_seq_len

    def refusals(self, model: Model) -> Iterable[Refusal]:
        yield from _refusals(model)

    def is_plain(self, model: Model) -> bool:
        return False

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"weight_limits": list(self.clip(model))}


MILLER = "Miller, Attention Is Off By One, 2023"
GPT_OSS = "OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025"
SOFTMAX_ONE = Method("softmax_one", MILLER, {"attention.softmax": "off_by_one"}, (OffByOne(),))
ATTENTION_SINK = Method("attention_sink", GPT_OSS, {"attention.softmax": "sink"}, (LearnedSink(),))
CLIPPED_SOFTMAX = Method(
    "clipped_softmax", BONDARENKO, {"attention.softmax": "clipped"}, (Clipped(),), (ClippedOptions,)
)
