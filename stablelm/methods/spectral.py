"""Spectral norms of weights: their start, and the refresh once an optimizer step (sigma reparametrisation).

Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, ICML 2023. The collectives
that a sharded refresh needs live in the engine: it passes a `reduce`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_SVD = 128
RESIDUAL = 1e-5
LONGEST, CHECK_EVERY = 300, 10
TINY = 1e-30


class Start(NamedTuple):
    """The largest singular value of a matrix and its vectors, float64: W u = sigma v; u: (d_in,), v: (d_out,)."""

    sigma: float
    u: Tensor
    v: Tensor


def start(weight: Tensor) -> Start:
    """The top singular triplet of a whole (d_out, d_in) matrix: an SVD for small ones, else Lanczos.

    The same on every rank, for it depends on the weight alone. A zero matrix raises ValueError.
    """
    matrix = weight.double()
    if not matrix.any():
        raise ValueError("a matrix of zeros has no direction of largest gain")
    if min(matrix.shape) <= LARGEST_SVD:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Start(float(values[0]), right[0], left[:, 0])
    return _lanczos(matrix)


class SharedStarts:
    """Starts shared out over ranks in turn: another rank's are zeros here, and the sum over ranks is `start` of all."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._seen = 0

    def __call__(self, weight: Tensor) -> Start:
        self._seen += 1
        if self._seen % self.world_size == self.rank:
            return start(weight)
        d_out, d_in = weight.shape
        return Start(0.0, torch.zeros(d_in, dtype=torch.float64), torch.zeros(d_out, dtype=torch.float64))


def _lanczos(matrix: Tensor) -> Start:
    """Golub-Kahan bidiagonalisation with full reorthogonalisation, until |W^T v - sigma u| <= RESIDUAL sigma.

    Such a residual leaves an error of its square in sigma (Parlett 1998, section 11.7).
    """
    rounds = min(LONGEST, *matrix.shape)
    rights, lefts = matrix.new_zeros(rounds + 1, matrix.shape[1]), matrix.new_zeros(rounds, matrix.shape[0])
    small = matrix.new_zeros(rounds + 1, rounds + 1)  # upper bidiagonal: V^T W U
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(matrix.shape[1], dtype=matrix.dtype, generator=generator)
    rights[0] = first / first.norm()
    size, p, values, q = 0, small, small, small
    while size < rounds:
        left = _orthogonal_to(matrix @ rights[size], lefts[:size])
        small[size, size] = left.norm()
        lefts[size] = left / small[size, size]
        right = _orthogonal_to(matrix.t() @ lefts[size], rights[: size + 1])
        small[size, size + 1] = right.norm()
        rights[size + 1] = right / small[size, size + 1].clamp(min=TINY)
        size += 1
        if size % CHECK_EVERY == 0 or size == rounds or small[size - 1, size] < TINY:
            p, values, q = torch.linalg.svd(small[:size, :size])
            if small[size - 1, size] * p[-1, 0].abs() <= RESIDUAL * values[0]:
                break
    u, v = q[0] @ rights[:size], p[:, 0] @ lefts[:size]
    return Start(float(values[0]), u / u.norm(), v / v.norm())


def _orthogonal_to(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


class Matrix(NamedTuple):
    """A matrix as one rank holds it: rows `first_row` ... of W (d_out, d_in), and u (d_in,) and v (d_out,) whole.

    Without vectors of its own u and v are empty tensors of that length, on the meta device.
    """

    rows: Tensor
    first_row: int
    u: Tensor
    v: Tensor


class Slice(NamedTuple):
    """A matrix as one rank holds it: elements `start` ... of the row-major W, the rest as in `Matrix`."""

    values: Tensor
    start: int
    u: Tensor
    v: Tensor

    def times(self, u: Tensor) -> Tensor:
        """This rank's part of the sum W u, (d_out,)."""
        found = torch.zeros_like(self.v)
        for row, column, block in self.blocks():
            found[row : row + len(block)] += block @ u[column : column + block.shape[1]]
        return found

    def transposed_times(self, v: Tensor) -> Tensor:
        """This rank's part of the sum W^T v, (d_in,)."""
        found = torch.zeros_like(self.u)
        for row, column, block in self.blocks():
            found[column : column + block.shape[1]] += v[row : row + len(block)] @ block
        return found

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(row, column, block) of a partial first row, whole rows and a partial last row, of those there are."""
        width, begin, size = len(self.u), 0, len(self.values)
        while begin < size:
            row, column = divmod(self.start + begin, width)
            rows = 0 if column else (size - begin) // width
            end = begin + rows * width if rows else min(begin + width - column, size)
            yield row, column, self.values[begin:end].view(max(rows, 1), -1)
            begin = end


Reduce = Callable[[Tensor], object]


@torch.no_grad()
def squared_rows(matrices: Sequence[Matrix | Slice], reduce: Reduce | None = None) -> list[Tensor]:
    """Squared length of each row of every whole matrix, (d_out,) each; at most one call of `reduce`."""
    found = []
    for part in matrices:
        held = part.values if isinstance(part, Slice) else part.rows
        squares = held.new_zeros(len(part.v))
        if isinstance(part, Slice):
            for row, _, block in part.blocks():
                squares[row : row + len(block)] += block.square().sum(dim=1)
        else:
            squares[part.first_row : part.first_row + len(held)] = held.square().sum(dim=1)
        found.append(squares)
    flat = torch.cat(found)
    if reduce is not None:
        reduce(flat)
    return list(flat.split([len(part.v) for part in matrices]))


@torch.no_grad()
def refresh(matrices: Sequence[Matrix | Slice], reduce: Reduce | None = None) -> None:
    """One power iteration for every matrix, in place: v <- W u / |W u|, u <- W^T v / |W^T v|.

    Where ranks hold different parts, `reduce` sums a flat tensor over ranks in place: one call for all matrices if
    the parts are rows, as W^T (W u) is a sum over rows and v only needs the others' rows; two calls for slices.
    """
    slices = [matrix for matrix in matrices if isinstance(matrix, Slice)]
    rows = [matrix for matrix in matrices if isinstance(matrix, Matrix)]
    if slices:
        assert reduce is not None
        _refresh_slices(slices, reduce)
    if rows:
        _refresh_rows(rows, reduce)


def _refresh_slices(slices: list[Slice], reduce: Reduce) -> None:
    left = torch.cat([part.times(part.u) for part in slices])
    reduce(left)
    for part, found in zip(slices, left.split([len(part.v) for part in slices]), strict=True):
        part.v.copy_(found / found.norm().clamp(min=TINY))
    right = torch.cat([part.transposed_times(part.v) for part in slices])
    reduce(right)
    for part, found in zip(slices, right.split([len(part.u) for part in slices]), strict=True):
        part.u.copy_(found / found.norm().clamp(min=TINY))


def _refresh_rows(matrices: list[Matrix], reduce: Reduce | None) -> None:
    parts = []
    for rows, first_row, u, v in matrices:
        product = rows @ u
        if reduce is not None:
            whole = torch.zeros_like(v)
            whole[first_row : first_row + len(rows)] = product
            parts.append(whole)
        else:
            parts.append(product)
        parts.append(rows.t() @ product)
    if reduce is not None:
        flat = torch.cat(parts)
        reduce(flat)
        parts = flat.split([len(part) for part in parts])
    for (_, _, u, v), left, right in zip(matrices, parts[::2], parts[1::2], strict=True):
        v.copy_(left / left.norm().clamp(min=TINY))
        u.copy_(right / right.norm().clamp(min=TINY))


@torch.no_grad()
def estimates(matrices: Sequence[Matrix | Slice], reduce: Reduce | None = None) -> Tensor:
    """sigma = v^T W u of every matrix, (matrices,): what the forward pass divides by."""
    found = torch.stack([_own_estimate(matrix) for matrix in matrices])
    if reduce is not None:
        reduce(found)
    return found


def _own_estimate(matrix: Matrix | Slice) -> Tensor:
    """This rank's part of the sum v^T W u."""
    if isinstance(matrix, Slice):
        return torch.dot(matrix.v, matrix.times(matrix.u))
    rows, first_row, u, v = matrix
    return torch.dot(v[first_row : first_row + len(rows)], rows @ u)


@torch.no_grad()
def tracking_errors(matrices: Sequence[Matrix | Slice], reduce: Reduce | None = None, iterations: int = 20) -> Tensor:
    """How far the tracked sigma lies below the one after `iterations` more, relative, (matrices,); nothing changes."""
    copies = [matrix._replace(u=matrix.u.clone(), v=matrix.v.clone()) for matrix in matrices]
    for _ in range(iterations):
        refresh(copies, reduce)
    return 1 - estimates(matrices, reduce) / estimates(copies, reduce)
