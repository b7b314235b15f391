"""The linear map of the model, plain or spectrally normalised, and the dtypes that `train.precision` stands for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    With `sigma`, W stands for (gamma / sigma) W, sigma = v^T W u with u, v constant, so that the gradient passes
    through sigma (Zhai et al., ICML 2023, eq. 1 and released code). gamma: (1,); u: (d_in,), v: (d_out,) buffers in
    the parameter dtype, which `methods.spectral` starts and refreshes: never in forward, which recompute runs twice.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool, dtypes: Dtypes, sigma: bool = False):
        super().__init__()
        self.compute_dtype = dtypes.compute
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtypes.parameter))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtypes.parameter)) if bias else None
        self.gamma = nn.Parameter(torch.empty(1, dtype=dtypes.parameter)) if sigma else None
        self.u: Tensor
        self.v: Tensor
        if sigma:
            self.register_buffer("u", torch.empty(d_in, dtype=dtypes.parameter))
            self.register_buffer("v", torch.empty(d_out, dtype=dtypes.parameter))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        if self.gamma is None:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias)
        return self.complete(F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype)))

    def complete(self, product: Tensor) -> Tensor:
        """What follows x W^T: the scale gamma / sigma, taken in the parameter dtype, and the bias."""
        if self.gamma is not None:
            # A sharding engine may hand the matrix out in the compute dtype already.
            sigma = torch.dot(self.v, torch.mv(self.weight.to(self.u.dtype), self.u))
            product = product * (self.gamma / sigma).to(product.dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class LowRankLinear(nn.Module):
    """Two factors, d_in -> rank -> d_out, in place of one matrix (MLRA: arXiv 2409.07787)."""

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool, dtypes: Dtypes, sigma: bool = False):
        super().__init__()
        self.down = Linear(d_in, rank, bias=False, dtypes=dtypes, sigma=sigma)
        self.up = Linear(rank, d_out, bias=bias, dtypes=dtypes, sigma=sigma)

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
