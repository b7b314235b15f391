"""Magneto: Sub-LN, a norm before each sub-layer and one before its output projection (Wang et al., ICML 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import BRANCH_MATRICES, Init, Method, Model, Placement, Role
from stablelm.methods.pre_ln import glorot

WANG = "Wang et al., Magneto: A Foundation Transformer, ICML 2023"


@dataclass(frozen=True)
class MagnetoInit(Init):
    name: ClassVar[str] = "magneto"
    sizes_branches: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Glorot's std, times sqrt(ln 2 n_layers) for value, output, fc1, gate, fc2 (section 3)."""
        gain = math.sqrt(math.log(2 * model.n_layers)) if role.kind in BRANCH_MATRICES else 1
        return glorot(shape) * gain

    def embedding_scale(self, model: Model) -> float:
        """sqrt(d_model), as in torchscale's language models: the stream starts with unit variance."""
        return math.sqrt(model.d_model)


DEFAULTS = {"placement": "sub", "init": "magneto"}
# Eqs. 1-5 and 11.
SUB = Placement("sub", before_body=True, before_output=True, final=True)
MAGNETO = Method("magneto", WANG, DEFAULTS, (SUB, MagnetoInit()))
