"""Norms over the last dimension, with statistics in at least fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.model.linear import Dtypes


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), with a gain and, for layernorm, maybe a bias."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes):
        super().__init__()
        self.kind = config.norm
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.d_model, dtype=dtypes.parameter))
        has_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.empty(config.d_model, dtype=dtypes.parameter)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) of any float dtype -> (..., d) in the parameter dtype (fp32, fp64 under fp64)."""
        x = x.to(self.weight.dtype)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
