"""A concatenated stream while it is trained on: a buffer that branches are appended to, read by products with matrices.

A norm before a matrix M needs no pass over the stream: with the sums of x and x^2 over each token's features kept
beside it, norm(x) M^T = (x M^T - mean M 1) / deviation, the norm's gain being in M's columns. Backward, all that read
the stream add to one buffer, and what goes through mean and deviation stays two numbers a token, which each branch
takes when it is reached. So beside products one addition, of gradients, passes over the stream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 8  # features; 16 bytes of bf16, as fast kernels of GPUs want it
WIDTHS = 32
"""Products read up to so many different widths: a library prepares each shape anew, and keeps a limited number."""


class Concatenation(NamedTuple):
    """All outputs so far, side by side. `read` and `append` return the one to go on with, and each is used once:
    gradients of all that read the stream go through the next one."""

    stream: Tensor
    """(batch, seq, width so far), the first columns of a buffer as wide as the stream at its end."""
    sums: Tensor
    """(batch, seq, 2): of a token's features and of their squares, in at least fp32."""
    inputs: Tensor
    """The stream in the compute dtype, without a gradient, of a buffer too; the stream's own if dtypes are equal."""

    @classmethod
    def start(cls, embedded: Tensor, width: int, dtype: torch.dtype) -> "Concatenation":
        """embedded: (batch, seq, d_model) -> the stream that holds it, and has room for `width` features."""
        room = embedded.new_zeros((*embedded.shape[:2], _rounded_up(width, ALIGNMENT)))
        inputs = room if room.dtype == dtype else torch.zeros_like(room, dtype=dtype)
        sums = room.new_zeros((*room.shape[:2], 2), dtype=torch.promote_types(room.dtype, torch.float32))
        return cls(room[..., :0], sums, inputs[..., :0]).append(embedded)

    @property
    def read_width(self) -> int:
        """The columns of the buffer that `read` multiplies: some that come after the stream, too."""
        room = self.inputs.stride(-2)
        return min(room, _rounded_up(self.inputs.shape[-1], _rounded_up(-(-room // WIDTHS), ALIGNMENT)))

    def append(self, branch: Tensor) -> "Concatenation":
        """branch: (batch, seq, growth) of any float dtype."""
        return Concatenation(*_Append.apply(*self, branch))  # pyright: ignore[reportGeneralTypeIssues]

    def read(
        self, matrix: Tensor, again: Callable[[], Tensor] | None, *, centred: bool, eps: float
    ) -> "tuple[Concatenation, Tensor]":
        """norm(stream) matrix^T, (batch, seq, d_out) in the compute dtype, after the stream that is read or appended to
        next; matrix: (d_out, `read_width`) in the compute dtype, zeros in the columns beyond the stream.

        The norm has no gain and no bias; `centred`: it subtracts the mean. `again` gives the matrix for the backward
        pass, until which it is kept where this is None.
        """
        made = _NormedProduct.apply(*self, matrix, again, centred, eps)  # pyright: ignore[reportGeneralTypeIssues]
        return Concatenation(made[0], made[1], self.inputs), made[2]


def _rounded_up(width: int, step: int) -> int:
    return -(-width // step) * step


def _columns(part: Tensor, start: int, end: int) -> Tensor:
    """Columns of the buffer whose first ones `part` is; not as a view, for which writing others would be a change."""
    shape, offset = (*part.shape[:-1], end - start), part.storage_offset() + start
    return part.new_empty(0).set_(part.untyped_storage(), offset, shape, part.stride())


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, sums: Tensor, inputs: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
        width, end = stream.shape[-1], stream.shape[-1] + branch.shape[-1]
        ctx.branch, ctx.dtype = _columns(stream, width, end), branch.dtype
        ctx.branch.copy_(branch)
        if inputs.dtype != stream.dtype:
            _columns(inputs, width, end).copy_(branch)
        wide = ctx.branch.to(sums.dtype)
        sums = sums + torch.stack((wide.sum(dim=-1), wide.square().sum(dim=-1)), dim=-1)
        inputs = _columns(inputs, 0, end)
        ctx.mark_non_differentiable(inputs)
        return _columns(stream, 0, end), sums, inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: Tensor, of_sums: Tensor, _: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        width = of_stream.shape[-1] - ctx.branch.shape[-1]
        of_sum, of_squares = of_sums.unbind(dim=-1)
        of_branch = torch.addcmul(of_sum[..., None], ctx.branch.to(of_sums.dtype), of_squares[..., None], value=2)
        of_branch += of_stream[..., width:]
        return of_stream[..., :width], of_sums, None, of_branch.to(ctx.dtype)


class _NormedProduct(torch.autograd.Function):
    """The stream and its sums are returned too, so that one buffer takes the gradients of all that reads them."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        sums: Tensor,
        inputs: Tensor,
        matrix: Tensor,
        again: Callable[[], Tensor] | None,
        centred: bool,
        eps: float,
    ) -> tuple[Tensor, ...]:
        width, ctx.again = stream.shape[-1], again
        ctx.inputs = _columns(inputs, 0, matrix.shape[1]).flatten(0, 1)
        product, (mean, squares) = ctx.inputs @ matrix.t(), (sums.flatten(0, 1) / width).unbind(dim=-1)
        rows = matrix.sum(dim=-1, dtype=sums.dtype) if centred else None
        if rows is None:
            inverse = (squares + eps).rsqrt_()
            made = torch.mul(product, inverse[:, None], out=torch.empty_like(product))
        else:
            inverse = (squares - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
            made = torch.addr(product.to(sums.dtype), mean, rows, alpha=-1).mul_(inverse[:, None]).to(product.dtype)
        ctx.save_for_backward(matrix if again is None else None, made, mean, inverse, rows)
        return stream, sums, made.unflatten(0, stream.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: Tensor, of_sums: Tensor, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        matrix, made, mean, inverse, rows = ctx.saved_tensors
        if matrix is None:
            with torch.no_grad():
                matrix = ctx.again()
        gradient = gradient.flatten(0, 1)
        scaled = torch.mul(gradient, inverse[:, None], out=torch.empty_like(made))
        of_matrix = scaled.t() @ ctx.inputs
        width = of_stream.shape[-1]
        of_stream.flatten(0, 1).add_((scaled @ matrix)[:, :width])
        # made = (x M^T - mean rows) inverse, and inverse = (squares - mean^2 + eps)^-1/2
        of_squares = torch.mul(gradient, made).sum(dim=-1, dtype=mean.dtype) * inverse.square() * -0.5
        of_mean = torch.zeros_like(of_squares)
        if rows is not None:
            wide = scaled.to(mean.dtype)
            of_mean = -2 * mean * of_squares - wide @ rows
            of_matrix -= (mean @ wide).to(of_matrix.dtype)[:, None]
        of_own = torch.stack((of_mean, of_squares), dim=-1) / width
        return of_stream, of_sums + of_own.view_as(of_sums), None, of_matrix, None, None, None
