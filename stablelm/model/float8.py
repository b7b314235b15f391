"""Matrix products of 8-bit floating-point numbers, from and to the compute dtype: `train.float8`.

Both factors of a product are scaled to the range of their format just before it (Micikevicius et al. 2022, arXiv
2209.05433), in the two recipes to which torchao gives these names. torchao's own layers were tried: they replace
`nn.Linear` modules, while a product here has several weights, with factors, in one matrix, and its function of tensors
is not public. torch's is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from stablelm.methods.sizes import FLOAT8_MULTIPLE

E4M3 = torch.float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).tiny


class Recipe(NamedTuple):
    """`by_row`: a scale for each row of what is multiplied, not one for the matrix; `gradients`: the format of
    products' gradients; all else is E4M3, of more digits and a smaller range."""

    by_row: bool
    gradients: torch.dtype


RECIPES = {"tensorwise": Recipe(False, torch.float8_e5m2), "rowwise": Recipe(True, E4M3)}


def _matmul(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, by_row: bool, fast: bool, dtype: torch.dtype
) -> Tensor:
    """left (n, k) right^T (m, k), times their scales, (n, m) in `dtype`; `fast`: as of `_multiply`."""
    recipe = ScalingType.RowWise if by_row else ScalingType.TensorWise
    scales = {"scale_a": left_scale, "scale_recipe_a": recipe, "scale_b": right_scale.t(), "scale_recipe_b": recipe}
    return scaled_mm(left, right.t(), **scales, output_dtype=dtype, use_fast_accum=fast)


# An operator of its own: a compiler takes it as it is, and `engine.recompute: selective` knows it.
_operator = torch.library.custom_op("stablelm::float8_matmul", _matmul, mutates_args=())
_operator.register_fake(_matmul)  # with the checks of torch's


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None, recipe: str | None) -> Tensor:
    """x (..., d_in), matrix (d_out, d_in), bias (d_out,), of one dtype -> x matrix^T + bias; None: not in float8."""
    if recipe is None:
        return F.linear(x, matrix, bias)
    product: Any = _Float8Product.apply(x, matrix, recipe)
    return product if bias is None else product + bias


def forward(x: Tensor, matrix: Tensor, recipe: str) -> Tensor:
    """x (..., d_in), matrix (d_out, d_in) -> x matrix^T in x's dtype; without a gradient."""
    flat = _multiply(x.flatten(0, -2), matrix, E4M3, by_row=RECIPES[recipe].by_row, fast=True)
    return flat.unflatten(0, x.shape[:-1])


def gradients(gradient: Tensor, x: Tensor, matrix: Tensor, recipe: str) -> tuple[Tensor, Tensor]:
    """Of x and matrix, from that of the product, (..., d_out)."""
    by_row, dtype = RECIPES[recipe]
    rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
    of_x = _multiply(rows, matrix.t(), dtype, by_row=by_row)
    if missing := -len(rows) % FLOAT8_MULTIPLE:  # rows of zeros add nothing
        rows, inputs = (F.pad(each, (0, 0, 0, missing)) for each in (rows, inputs))
    return of_x.view_as(x), _multiply(rows.t(), inputs.t(), dtype, by_row=by_row)


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype, *, by_row: bool, fast: bool = False) -> Tensor:
    """left (n, k) in a format `dtype`, right (m, k) in E4M3 -> left right^T, (n, m); `fast`: sums in fewer digits, as
    torchao's recipes have them in the forward pass alone."""
    return _operator(*_scaled(left, dtype, by_row), *_scaled(right, E4M3, by_row), by_row, fast, left.dtype)


def _scaled(matrix: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """matrix (n, k) in a format, its rows in one piece, and the fp32 scale of each row (n, 1), or of all (1, 1).

    What is not finite gives scales, and so products, that are not.
    """
    wide = matrix.float()
    largest = wide.abs().amax(-1, keepdim=True) if by_row else wide.abs().amax().view(1, 1)
    scale = (largest / torch.finfo(dtype).max).clamp_min(SMALLEST)
    if by_row:  # a power of two rounds a number alike in the forward and the backward pass, whatever its row's scale
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (wide / scale).to(dtype).contiguous(), scale


class _Float8Product(torch.autograd.Function):
    """x matrix^T, which keeps both as they were given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.recipe = recipe
        return forward(x, matrix, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, matrix = ctx.saved_tensors
        return *gradients(gradient, x, matrix, ctx.recipe), None
