"""The feed-forward's nonlinearities: ReLU, GELU (exact, by erf, and by tanh) and SwiGLU."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.axes import Activation, Model
from stablelm.theory.moments import GELU, RELU, SILU, Function, LeakyRelu

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Relu(Activation):
    name: ClassVar[str] = "relu"
    standard: ClassVar[str | None] = "relu"
    scales_evenly: ClassVar[bool] = True

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        # In the form that the next matrix takes: a compiler then keeps nothing else, else a slow mask of bytes besides.
        return hidden.flatten(0, -2).relu().view_as(hidden)

    def function(self) -> Function:
        return RELU


@dataclass(frozen=True)
class UnitLeakyRelu(Activation):
    """A leaky relu times sqrt(2 / (1 + slope^2)), which keeps the variance of Gaussian inputs."""

    keeps_variance: ClassVar[bool] = True
    slope: float = 0.0

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        from stablelm.methods.kernels import leaky_relu

        return leaky_relu(hidden, self.slope, self.output_scale())

    def function(self) -> Function:
        return LeakyRelu(self.slope)

    def output_scale(self) -> float:
        return math.sqrt(2 / (1 + self.slope**2))

    def second_moment(self, variance: float) -> float:
        return variance

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"negative_slope": self.slope}


@dataclass(frozen=True)
class GeluErf(Activation):
    name: ClassVar[str] = "gelu"
    standard: ClassVar[str | None] = "gelu"
    scales_evenly: ClassVar[bool] = True

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        import torch.nn.functional as F

        return F.gelu(hidden)

    def function(self) -> Function:
        return GELU


@dataclass(frozen=True)
class GeluTanh(Activation):
    """GPT-2's approximation x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Hendrycks & Gimpel 2016)."""

    name: ClassVar[str] = "gelu_tanh"
    standard: ClassVar[str | None] = "gelu_new"
    scales_evenly: ClassVar[bool] = True

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        import torch.nn.functional as F

        return F.gelu(hidden, approximate="tanh")

    def function(self) -> Function:
        # They differ by less than 0.0005 everywhere.
        return GELU


@dataclass(frozen=True)
class SwiGlu(Activation):
    """silu(gate x) * fc1 x (Shazeer 2020); its width keeps the parameters of two matrices of 4 d_model."""

    name: ClassVar[str] = "swiglu"
    standard: ClassVar[str | None] = "silu"
    gated: ClassVar[bool] = True

    def d_ff(self, d_model: int) -> int:
        """8/3 d_model, rounded up to a multiple of 64."""
        return -(-8 * d_model // (3 * 64)) * 64

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        import torch.nn.functional as F

        assert gate is not None
        return F.silu(gate) * hidden

    def function(self) -> Function:
        return SILU


ACTIVATIONS = (Relu(), GeluErf(), GeluTanh(), SwiGlu())
