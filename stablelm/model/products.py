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
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    vectors: Sequence[Vectors],
    dtype: torch.dtype,
    columns: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """The rows of all weights, (d_out, d_in) each, one below the other in `dtype`.

    `gains`, none or one (1,) or (d_out,) for each weight, multiply its rows before they are rounded; with `vectors`
    too, of each weight, gain / sigma does, and the gains are (1,). `columns` (d_in,) multiplies those of all; with it
    there are `width` of them, and those beyond d_in are zeros.
    """
    wide = weights[0].shape[1] if width is None else width
    return _Matrix.apply(dtype, vectors, len(weights), wide, columns, *weights, *gains)  # pyright: ignore[reportReturnType]


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
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        vectors: Sequence[Vectors],
        n: int,
        width: int,
        columns: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        weights, gains = parameters[:n], parameters[n:]
        rows = [len(weight) for weight in weights]
        matrix, d_in = weights[0].new_empty((sum(rows), width), dtype=dtype), weights[0].shape[1]
        factors, norms = gains, ()
        if vectors:
            norms = (_joined([own.sigma for own in vectors]),)
            factors = (_joined(gains) / norms[0]).split(1)
        parts = matrix.split(rows)
        if width > d_in:
            matrix[:, d_in:].zero_()
            parts = matrix[:, :d_in].split(rows)
        if gains:
            for part, weight, factor in zip(parts, weights, factors, strict=True):
                torch.mul(*_scaled(weight, factor, columns), out=part)
        elif columns is not None:
            for part, weight in zip(parts, weights, strict=True):
                torch.mul(weight, columns, out=part)
        else:
            copy_all(parts, weights)
        ctx.vectors, ctx.n, ctx.rows, ctx.d_in, ctx.dtype = vectors, n, rows, d_in, weights[0].dtype
        ctx.save_for_backward(columns, *(weights if gains or columns is not None else ()), *factors, *norms)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """With G = dL/dM for M = f W: dL/df = <G, W> and dL/dW = f G; with f = g / s, s = v^T W u, dL/dg = <G, W> / s
        and dL/dW = f (G - dL/dg v u^T). For M = f W c, dL/dc is the sum over rows of f G W, and G c takes G's place."""
        columns, *saved = ctx.saved_tensors
        weights, factors, norms = (saved[start : start + ctx.n] for start in (0, ctx.n, 2 * ctx.n))
        whole, of_columns = gradient[:, : ctx.d_in].to(ctx.dtype, copy=bool(saved)), None
        parts = whole.split(ctx.rows)
        if columns is not None:
            of_columns = _over_rows(parts, weights, factors)
            whole.mul_(columns)
        if not factors:
            return None, None, None, None, of_columns, *parts
        slopes = [_slope(part, weight, factor) for part, weight, factor in zip(parts, weights, factors, strict=True)]
        if norms:
            slopes = (_joined(slopes) / norms[0]).split(1)
            for part, slope, (_, v, u) in zip(parts, slopes, ctx.vectors, strict=True):
                part.addcmul_((v * slope)[:, None], u[None], value=-1)
        whole.mul_(_joined([factor.expand(n) for factor, n in zip(factors, ctx.rows, strict=True)])[:, None])
        return None, None, None, None, of_columns, *parts, *slopes


def _scaled(weight: Tensor, factor: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two tensors whose product is f W c."""
    if columns is None:
        return weight, factor[:, None]
    return (weight, factor * columns) if len(factor) == 1 else (weight * factor[:, None], columns)


def _over_rows(gradients: Sequence[Tensor], weights: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """The sum over all rows of f G W, (d_in,)."""
    products = [gradient * weight for gradient, weight in zip(gradients, weights, strict=True)]
    if not factors:
        return torch.stack([product.sum(dim=0) for product in products]).sum(dim=0)
    # Norms are fp32 where an engine gathers weights in bf16.
    pairs = zip(products, factors, strict=True)
    return torch.stack([factor.expand(len(product)) @ product.to(factor.dtype) for product, factor in pairs]).sum(dim=0)


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
