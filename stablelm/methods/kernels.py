"""What passes over the stream and over queries and keys, in as few kernels as torch has without a compiler.

Most are written twice: from single operations, which a compiler fuses with what is around, and as a function of
autograd that computes the same in fewer passes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_sum(x: Tensor, branch: Tensor, skip: float, gain: float) -> Tensor:
    """skip x + gain branch in x's dtype, (..., width); the branch may have another one."""
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        branch = branch.to(x.dtype)
    if (skip == gain == 1) or torch.compiler.is_compiling():
        return (x if skip == 1 else x * skip).add(branch, alpha=gain)
    return _WeightedSum.apply(x, branch, skip, gain)  # pyright: ignore[reportReturnType]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, skip: float, gain: float) -> Tensor:
        ctx.gains, ctx.dtype = (skip, gain), branch.dtype
        return x.add(branch, alpha=gain) if skip == 1 else (x * skip).add_(branch, alpha=gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        skip, gain = ctx.gains
        own = torch.empty_like(gradient, dtype=ctx.dtype)
        return gradient if skip == 1 else gradient * skip, torch.mul(gradient, gain, out=own), None, None


def leaky_relu(x: Tensor, slope: float, gain: float) -> Tensor:
    """gain x where x > 0, else gain slope x, for a slope >= 0 and a gain > 0; x: (..., width).

    Made in two dimensions, as the next matrix takes it: what that keeps for its gradient serves here too.
    """
    return _LeakyRelu.apply(x.flatten(0, -2), slope, gain).view_as(x)  # pyright: ignore[reportAttributeAccessIssue]


class _LeakyRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, gain: float) -> Tensor:
        ctx.slope, ctx.gain = slope, gain
        made = F.leaky_relu(x, slope) * gain
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (made,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, made, ctx.slope, True) * ctx.gain, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (batch, seq, heads, d_head) with feature i and i + d_head / 2 turned as a pair, rounded once to x's dtype.

    cos, sin: (seq, 1, d_head / 2), in at least x's precision.
    """
    if not torch.compiler.is_compiling():
        return _Turned.apply(x, cos, sin)  # pyright: ignore[reportReturnType]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """In three kernels; `sign`: of the angle."""
    pairs = x.unflatten(-1, (2, -1))  # (batch, seq, heads, 2, d_head / 2)
    parts = pairs * cos.unsqueeze(-2)
    made = torch.empty_like(pairs, dtype=x.dtype) if parts.dtype != x.dtype else parts
    (first, second), ends = pairs.unbind(-2), made.unbind(-2)
    torch.addcmul(parts[..., 0, :], second, sin, value=-sign, out=ends[0])
    torch.addcmul(parts[..., 1, :], first, sin, value=sign, out=ends[1])
    return made.flatten(-2)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None
