"""The norms: LayerNorm, RMSNorm, CRMSNorm and DyT."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.axes import Model, NormKind, Refusal
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


@dataclass(frozen=True)
class CompressedRmsNorm(NormKind):
    """RMSNorm of x and one more feature, minus the sum of all: of a vector of mean zero whose last feature is left out.

    x / sqrt((sum x^2 + (sum x)^2) / (width + 1)) (CRMSNorm: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers,
    NeurIPS 2023, section 3.2). A model of this norm and width d computes what a layernorm model of width d + 1 does
    whose stream has mean zero. Its initial values are those of such a model: what is written onto the stream has the
    covariance of d features out of d + 1 that sum to zero, I - 1 1^T / (d + 1).
    """

    name: ClassVar[str] = "crmsnorm"
    has_bias: ClassVar[bool] = False
    wide_inside: ClassVar[bool] = True

    def apply(self, x: "Tensor", weight: Any, bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        import torch

        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(dim=-1, keepdim=True) + wide.sum(dim=-1, keepdim=True).square()
        return (wide * torch.rsqrt(squares / (x.shape[-1] + 1) + eps)).to(x.dtype) * weight

    def start(self, value: "Tensor", dim: int) -> "Tensor":
        width = value.shape[dim]
        return value.sub_(value.mean(dim=dim, keepdim=True).mul_(1 - (width + 1) ** -0.5))

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        return NormTheory(scale=scale, eps=model.norm_eps)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        placement = model.axes.placement
        if placement.before_output or placement.on_branch or placement.after_write:
            yield Refusal(
                ("model.norm", "model.placement"),
                "only a stream of mean zero has a feature that follows from the others, and norms elsewhere would take "
                "it for one; use model.norm=rmsnorm or model.placement=pre",
            )
        elif model.axes.stream.grows:
            yield Refusal(
                ("model.norm", "model.stream"),
                "a concatenation of parts that each lack a feature lacks several, and the norm adds one; "
                "use model.norm=rmsnorm",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"norm_compressed": True}

    def import_obstacle(self, model: Model) -> str:
        return "its norms read a stream that lacks a feature, and those of a plain model a whole one"


NORMS = (LayerNorm(), RmsNorm(), CompressedRmsNorm(), DyT())
