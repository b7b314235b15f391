"""WeSaR: all matrices start with one std, and a learned gain gives each its size (Nishida et al., EMNLP 2024).

W stands for alpha W with a trainable scalar alpha for each matrix; W is drawn with a common std, and alpha starts at
the std that the initialisation asks for over it (section 3.1). Relative to their size all matrices then move alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.key import ABOVE_0, key
from stablelm.methods.axes import Method, MethodOptions, Model, Reparam, Role
from stablelm.methods.pre_ln import FanIn

if TYPE_CHECKING:
    from torch import Tensor

NISHIDA = "Nishida et al., Initialization of LLMs via Reparameterization to Mitigate Loss Spikes, EMNLP 2024"


@dataclass(frozen=True)
class WesarOptions(MethodOptions):
    """Options of reparam: wesar."""

    SECTION: ClassVar[str] = "wesar"

    std: float = key(4e-5**0.5, "std of all matrices of the layers at the start", identity=True, range=ABOVE_0)


@dataclass(frozen=True)
class Wesar(Reparam):
    name: ClassVar[str] = "wesar"
    replaces: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False

    def applies(self, model: Model, sublayer: int) -> bool:
        return True

    def parameters(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"matrix_gain": (1,)}

    def split(self, weight: "Tensor", model: Model, std: float | None) -> "dict[str, Tensor]":
        """The gain, and the matrix divided by it; a matrix that was not drawn counts by its root mean square."""
        import torch

        if std is None:
            std = float(weight.double().square().mean().sqrt()) or 1.0
        gain = torch.full((1,), std / model.option(WesarOptions).std, dtype=torch.float32)
        return {"matrix_gain": gain, "weight": weight / gain.to(weight.dtype)}

    def factor(self, linear: Any) -> "Tensor":
        return linear.matrix_gain


@dataclass(frozen=True)
class FanInByDepth(FanIn):
    name: ClassVar[str] = "fan_in_by_depth"

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """1 / sqrt(fan_in), output projections over sqrt(2 n_layers) (He et al. 2015 with GPT-2's scaling; section
        3.2 of Nishida et al.)."""
        return super().std(role, shape, model) / ((2 * model.n_layers) ** 0.5 if role.kind in ("output", "fc2") else 1)


WESAR = Method(
    "wesar",
    NISHIDA,
    {"reparam": "wesar", "init": "fan_in_by_depth"},
    (Wesar(), FanInByDepth()),
    (WesarOptions,),
)
