"""The linear map of the model, plain or reparametrised, and the dtypes that `train.precision` stands for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Reparam


@dataclass(frozen=True)
class Dtypes:
    """`parameter`: storage of weights; `compute`: inputs of matrix products; `stream`: the residual stream."""

    parameter: torch.dtype
    compute: torch.dtype
    stream: torch.dtype


def make_dtypes(precision: str, stream_dtype: str) -> Dtypes:
    """The dtypes of precision fp32, bf16 or fp64; `stream_dtype` (fp32 or bf16) counts under bf16 only."""
    if precision == "bf16":
        stream = torch.bfloat16 if stream_dtype == "bf16" else torch.float32
        return Dtypes(torch.float32, torch.bfloat16, stream)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    return Dtypes(dtype, dtype, dtype)


class Linear(nn.Module):
    """x W^T + b with W (d_out, d_in) kept in the parameter dtype; multiplies and returns in the compute dtype.

    With `reparam`, what W stands for: its parameters and buffers, in the parameter dtype, beside W, and a factor of the
    product.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool, dtypes: Dtypes, reparam: Reparam | None = None):
        super().__init__()
        self.compute_dtype, self.reparam = dtypes.compute, reparam
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtypes.parameter))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtypes.parameter)) if bias else None
        if reparam is not None:
            for name, shape in reparam.parameters(d_in, d_out).items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtypes.parameter)))
            for name, shape in reparam.buffers(d_in, d_out).items():
                self.register_buffer(name, torch.empty(shape, dtype=dtypes.parameter))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what a reparametrisation registers

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        if self.reparam is None:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias)
        return self.complete(F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype)))

    def complete(self, product: Tensor) -> Tensor:
        """What follows x W^T: the factor, taken in the parameter dtype, and the bias."""
        factor = None if self.reparam is None else self.reparam.factor(self)
        if factor is not None:
            product = product * factor.to(product.dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @torch.no_grad()
    def fix(self) -> None:
        """For a model that is not trained any more: the factor goes into the weight, which takes the compute dtype.

        In memory it is turned round, which CPUs multiply faster with a few rows, as when a text grows token by token.
        """
        factor = None if self.reparam is None else self.reparam.factor(self)
        weight = self.weight if factor is None else self.weight * factor[:, None]
        turned = weight.to(self.compute_dtype).t().contiguous().t()
        self.weight, self.reparam = nn.Parameter(turned, requires_grad=False), None


def reparam_of(config: ModelConfig, sublayer: int) -> Reparam | None:
    """The reparametrisation of a sub-layer's matrices, None where they are what they are."""
    reparam = config.axes.reparam
    return reparam if reparam.applies(config, sublayer) else None


class LowRankLinear(nn.Module):
    """Two factors, d_in -> rank -> d_out, in place of one matrix (MLRA: arXiv 2409.07787)."""

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool, dtypes: Dtypes, reparam: Reparam | None = None):
        super().__init__()
        self.down = Linear(d_in, rank, bias=False, dtypes=dtypes, reparam=reparam)
        self.up = Linear(rank, d_out, bias=bias, dtypes=dtypes, reparam=reparam)

    @property
    def weight(self) -> Tensor:
        """The matrix that meets the input, (rank, d_in)."""
        return self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        return self.up(self.down(x))

    def complete(self, product: Tensor) -> Tensor:
        """What follows the product with `weight`."""
        return self.up(self.down.complete(product))
