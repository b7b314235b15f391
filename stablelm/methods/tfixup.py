"""T-Fixup: an initialisation that needs no norms (Huang et al., ICML 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import BRANCH_MATRICES, Init, Method, Model, Role
from stablelm.methods.pre_ln import glorot


@dataclass(frozen=True)
class TFixupInit(Init):
    name: ClassVar[str] = "tfixup"
    sizes_branches: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Glorot's std, times 0.67 n_layers^(-1/4) for value, output, fc1, gate, fc2 (section 3.2).

        The encoder's constant, for a GPT layer has two sub-layers as an encoder's has.
        """
        return glorot(shape) * (0.67 * model.n_layers**-0.25 if role.kind in BRANCH_MATRICES else 1)

    def embedding_std(self, model: Model) -> float:
        """(9 n_layers)^-1/4 / sqrt(d_model) (section 3.2)."""
        return (9 * model.n_layers) ** -0.25 * model.d_model**-0.5


TFIXUP = Method(
    "tfixup",
    "Huang et al., Improving Transformer Optimization Through Better Initialization, ICML 2020",
    {"placement": "none", "init": "tfixup", "activation": "relu"},
    (TFixupInit(),),
)
