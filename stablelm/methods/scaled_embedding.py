"""Spike No More: small matrices, and embeddings of unit variance by a scale or a norm (Takase et al., 2023).

Large gradients come from a stream that starts too small before its first norm: embeddings are multiplied by sqrt(d)
("Scaled Embed") or normalised ("Embed LN"), with weights of std sqrt(2 / (5 d)), output projections over sqrt(2 N)
(sections 3 to 5; the small initialisation is that of Nguyen & Salazar 2019).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import Init, Method, Model, Role

TAKASE = "Takase et al., Spike No More: Stabilizing the Pre-training of Large Language Models, 2023"


@dataclass(frozen=True)
class Small(Init):
    name: ClassVar[str] = "small"

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """sqrt(2 / (5 d_model)), output projections over sqrt(2 n_layers)."""
        return self._small(model) / (math.sqrt(2 * model.n_layers) if role.kind in ("output", "fc2") else 1)

    def embedding_std(self, model: Model) -> float:
        return self._small(model)

    def head_std(self, model: Model) -> float:
        return self._small(model)

    def _small(self, model: Model) -> float:
        return math.sqrt(2 / (5 * model.d_model))


@dataclass(frozen=True)
class SmallScaled(Small):
    name: ClassVar[str] = "small_scaled"

    def embedding_scale(self, model: Model) -> float:
        """sqrt(d_model)."""
        return math.sqrt(model.d_model)


SCALED_EMBED = Method("scaled_embed", TAKASE, {"init": "small_scaled"}, (Small(), SmallScaled()))
EMBED_LN = Method("embed_ln", TAKASE, {"init": "small", "embedding_norm": True})
