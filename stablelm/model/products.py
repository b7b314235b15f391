"""One product with several matrices side by side, from the weights as they are kept.

Autograd alone would copy each weight to the compute dtype, multiply x by each copy, and add up the gradients of x. Here
the weights, times their factors, are cast into one matrix, and its gradient becomes those of all that it is made of.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelm.model import float8
from stablelm.private_names import copy_all


class Vectors(NamedTuple):
    """A norm v^T W u by which W is divided: its value sigma (1,), and v (d_out,) and u (d_in,), which are constant."""

    sigma: Tensor
    v: Tensor
    u: Tensor


def one_matrix(
    weights: Sequence[Tensor], gains: Sequence[Tensor], vectors: Sequence[Vectors], dtype: torch.dtype
) -> Tensor:
    """The rows of all weights, (d_out, d_in) each, one below the other in `dtype`.

    `gains`, none or one (1,) or (d_out,) for each weight, multiply its rows before they are rounded; with `vectors`
    too, of each weight, gain / sigma does, and the gains are (1,).
    """
    return _Matrix.apply(dtype, vectors, len(weights), *weights, *gains)  # pyright: ignore[reportReturnType]


def product(
    x: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    vectors: Sequence[Vectors],
    bias: Tensor | None,
    *,
    keep: bool = False,
    recipe: str | None = None,
) -> Tensor:
    """x (..., d_in) -> x M^T + bias, (..., d_out of all), where M is `one_matrix` in x's dtype; bias: (d_out of all,).

    M is kept for the backward pass if it is a copy in another dtype than the weights', or with `keep`. Otherwise it is
    made again: an engine that shards the weights frees them meanwhile, and then M must not stay either. With a `recipe`
    of `model.float8` it always is: what is kept for the backward pass is scaled anew there.
    """
    if recipe is None and (keep or weights[0].dtype != x.dtype):
        return F.linear(x, one_matrix(weights, gains, vectors, x.dtype), bias)
    return _Product.apply(x, bias, vectors, recipe, len(weights), *weights, *gains)  # pyright: ignore[reportReturnType]


class _Matrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, vectors: Sequence[Vectors], n: int, *parameters: Tensor) -> Tensor:
        weights, gains = parameters[:n], parameters[n:]
        rows = [len(weight) for weight in weights]
        matrix = weights[0].new_empty((sum(rows), weights[0].shape[1]), dtype=dtype)
        factors, norms = gains, ()
        if vectors:
            norms = (_joined([own.sigma for own in vectors]),)
            factors = (_joined(gains) / norms[0]).split(1)
        if gains:
            for part, weight, factor in zip(matrix.split(rows), weights, factors, strict=True):
                torch.mul(weight, factor[:, None], out=part)
        else:
            copy_all(matrix.split(rows), weights)
        ctx.vectors, ctx.n, ctx.rows, ctx.dtype = vectors, n, rows, weights[0].dtype
        ctx.save_for_backward(*(weights if gains else ()), *factors, *norms)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """With G = dL/dM for M = f W: dL/df = <G, W> and dL/dW = f G; with f = g / s, s = v^T W u, dL/dg = <G, W> / s
        and dL/dW = f (G - dL/dg v u^T)."""
        saved = ctx.saved_tensors
        whole = gradient.to(ctx.dtype, copy=bool(saved))
        parts = whole.split(ctx.rows)
        if not saved:
            return None, None, None, *parts
        weights, factors, norms = (saved[start : start + ctx.n] for start in (0, ctx.n, 2 * ctx.n))
        slopes = [_slope(part, weight, factor) for part, weight, factor in zip(parts, weights, factors, strict=True)]
        if norms:
            slopes = (_joined(slopes) / norms[0]).split(1)
            for part, slope, (_, v, u) in zip(parts, slopes, ctx.vectors, strict=True):
                part.addcmul_((v * slope)[:, None], u[None], value=-1)
        whole.mul_(_joined([factor.expand(n) for factor, n in zip(factors, ctx.rows, strict=True)])[:, None])
        return None, None, None, *parts, *slopes


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """1-dim tensors end to end."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _slope(gradient: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """<G, W> for a factor (1,), else row by row; without a product of whole matrices beside them."""
    if len(factor) == 1:
        return gradient.flatten().dot(weight.flatten())[None]
    return torch.einsum("ij,ij->i", gradient, weight)


class _Product(torch.autograd.Function):
    """x M^T + bias, which keeps what M is made of in place of M."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Vectors],
        recipe: str | None,
        n: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.vectors, ctx.recipe, ctx.n, ctx.has_bias = vectors, recipe, n, bias is not None
        ctx.save_for_backward(x, *parameters)
        return float8.linear(x, one_matrix(parameters[:n], parameters[n:], vectors, x.dtype), bias, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *parameters = ctx.saved_tensors
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        with torch.enable_grad():
            matrix = one_matrix(leaves[: ctx.n], leaves[ctx.n :], ctx.vectors, x.dtype)
        flat = gradient.flatten(0, -2)
        if ctx.recipe is None:
            of_x, of_matrix = gradient @ matrix.detach(), flat.t() @ x.flatten(0, -2)
        else:
            of_x, of_matrix = float8.gradients(gradient, x, matrix.detach(), ctx.recipe)
        slopes = torch.autograd.grad(matrix, leaves, of_matrix)
        return of_x, flat.sum(dim=0) if ctx.has_bias else None, None, None, None, *slopes
