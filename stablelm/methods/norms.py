"""The norms: LayerNorm, RMSNorm and DyT."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.axes import Model, NormKind
from stablelm.theory import moments
from stablelm.theory.kernels import NormTheory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerNorm(NormKind):
    """Ba et al. 2016."""

    name: ClassVar[str] = "layernorm"
    wide_inside: ClassVar[bool] = True
    standard: ClassVar[str | None] = "layer"

    def apply(self, x: "Tensor", weight: "Tensor", bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        import torch.nn.functional as F

        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        return NormTheory(centred=True, scale=scale, eps=model.norm_eps)


@dataclass(frozen=True)
class RmsNorm(NormKind):
    """Zhang & Sennrich 2019."""

    name: ClassVar[str] = "rmsnorm"
    wide_inside: ClassVar[bool] = True
    standard: ClassVar[str | None] = "rms"
    has_bias: ClassVar[bool] = False

    def apply(self, x: "Tensor", weight: "Tensor", bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        import torch.nn.functional as F

        return F.rms_norm(x, weight.shape, weight, eps)

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        return NormTheory(scale=scale, eps=model.norm_eps)


@dataclass(frozen=True)
class DyT(NormKind):
    """tanh(alpha x) with a learned alpha (1,), no statistics at all (Zhu et al. 2025, arXiv 2503.10622)."""

    name: ClassVar[str] = "dyt"
    has_slope: ClassVar[bool] = True

    def apply(self, x: "Tensor", weight: "Tensor", bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        x = (alpha * x).tanh() * weight
        return x if bias is None else x + bias

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        return NormTheory(scale=scale, alpha=self.slope(model, attention=False))

    def variance(self, model: Model, variance: float, attention: bool) -> float:
        return float(moments.dyt_second_moment(self.slope(model, attention), variance))

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"norm_slope": model.norm_alpha}


NORMS = (LayerNorm(), RmsNorm(), DyT())
