"""Norms over the last dimension, with statistics in at least fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.model.linear import Dtypes


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019) or DyT (Zhu et al. 2025), gain and maybe bias.

    DyT is tanh(alpha x) with a learned alpha (1,), no statistics at all. `scale` is a constant that multiplies
    the output. A bias is there if `config.bias` is, except in rmsnorm.
    """

    def __init__(self, config: ModelConfig, dtypes: Dtypes, width: int, *, kind: str | None = None, scale: float = 1.0):
        super().__init__()
        self.kind = kind or config.norm
        self.eps = config.norm_eps
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(width, dtype=dtypes.parameter))
        has_bias = config.bias and self.kind != "rmsnorm"
        self.bias = nn.Parameter(torch.empty(width, dtype=dtypes.parameter)) if has_bias else None
        self.alpha = nn.Parameter(torch.empty(1, dtype=dtypes.parameter)) if self.kind == "dyt" else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) of any float dtype -> the same shape in the parameter dtype (fp32, fp64 under fp64)."""
        x = x.to(self.weight.dtype)
        weight, bias = self.weight, self.bias
        if self.scale != 1:
            weight, bias = weight * self.scale, None if bias is None else bias * self.scale
        if self.alpha is not None:
            x = torch.tanh(self.alpha * x) * weight
            return x if bias is None else x + bias
        if self.kind == "rmsnorm":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)
