"""Norms over the last dimension, with statistics in at least fp32."""

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods import axes
from stablelm.model.linear import Dtypes


class Norm(nn.Module):
    """The model's norm with its gain and, if the model has biases and the norm takes one, a bias.

    `kind`: another norm than the model's; `scale` and `eps_scale` are constants that multiply the output and the eps.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtypes: Dtypes,
        width: int,
        *,
        kind: axes.NormKind | None = None,
        scale: float = 1.0,
        eps_scale: float = 1.0,
    ):
        super().__init__()
        self.kind = kind or config.axes.norm
        self.eps = config.norm_eps * eps_scale
        self.scale = scale
        self.parameter_dtype = dtypes.parameter
        self.weight = nn.Parameter(torch.empty(width, dtype=dtypes.parameter)) if self.kind.has_gain else None
        has_bias = bool(config.bias) and self.kind.has_bias
        self.bias = nn.Parameter(torch.empty(width, dtype=dtypes.parameter)) if has_bias else None
        self.alpha = nn.Parameter(torch.empty(1, dtype=dtypes.parameter)) if self.kind.has_slope else None

    @property
    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Gain and bias, (width,) each in the parameter dtype, of a norm that has a gain, times `scale`."""
        assert self.weight is not None
        if self.scale == 1:
            return self.weight, self.bias
        return self.weight * self.scale, None if self.bias is None else self.bias * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) of any float dtype -> the same shape, in the parameter dtype, or x's if the norm can.

        What is kept in bf16 is read and written in bf16, and so are the gain and the bias, as are the matrices that
        follow; the computation is in fp32.
        """
        dtype = x.dtype if self.kind.wide_inside else self.parameter_dtype
        if self.weight is None:
            made = self.kind.apply(x.to(dtype), None, self.bias, self.alpha, self.eps)
            return made if self.scale == 1 else made * self.scale
        weight, bias = self.affine
        bias = None if bias is None else bias.to(dtype)
        return self.kind.apply(x.to(dtype), weight.to(dtype), bias, self.alpha, self.eps)
