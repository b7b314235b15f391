"""NormFormer: Pre-LN with more norms and a factor for each head (Shleifer et al. 2021, arXiv 2110.09456)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.admin import with_learned_skip
from stablelm.methods.axes import Added, Method, Model, Placement, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class ResScale(Stream):
    """s * x + f(x) in feed-forward sub-layers, s (width,) from 1; x + f(x) in the others (section 3, ResScale)."""

    name: ClassVar[str] = "res_scale"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("skip", np.ones(model.d_model)),) if sublayer % 2 else ()

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        return with_learned_skip(chunks, branch, added["skip"]) if added else super().write(chunks, branch, added)

    def export_obstacle(self, model: Model) -> str:
        return "its skips have a learned factor for each feature, which no standard architecture has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"learned_skip": ["feedforward"]}


ATTENTION = Placement("normformer", before_body=True, on_branch=True)
FEEDFORWARD = Placement("normformer", before_body=True, before_output=True)


@dataclass(frozen=True)
class MoreNorms(Placement):
    """On the branch of attention, before the last matrix of feed-forward, and a factor for each head (section 3)."""

    def at(self, model: Model, sublayer: int) -> Placement:
        return FEEDFORWARD if sublayer % 2 else ATTENTION

    def used(self) -> tuple[Placement, ...]:
        return ATTENTION, FEEDFORWARD

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        return (Added("head_scale", np.ones(model.n_heads)),)

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"head_scales": True}

    def mixed(self, heads: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        return heads * added["head_scale"].to(heads.dtype)[:, None]


NORMFORMER = Method(
    "normformer",
    "Shleifer et al., NormFormer: Improved Transformer Pretraining with Extra Normalization, 2021",
    {"placement": "normformer"},
    (ResScale(), MoreNorms("normformer", before_body=True, final=True)),
)
