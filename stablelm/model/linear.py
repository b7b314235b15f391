"""The linear map of the model, and the dtypes that `train.precision` stands for."""

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
    """x W^T + b with W (d_out, d_in) kept in the parameter dtype; multiplies and returns in the compute dtype."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, dtypes: Dtypes):
        super().__init__()
        self.compute_dtype = dtypes.compute
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtypes.parameter))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtypes.parameter)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias)
