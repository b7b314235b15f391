"""Spectral norms of weights: their start, and the refresh once an optimizer step (sigma reparametrisation).

Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, ICML 2023. The collectives
that a sharded refresh needs live in the engine: it passes a `reduce`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_SVD = 256
RESIDUAL = 1e-6
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


def _lanczos(matrix: Tensor, rounds: int = 300) -> Start:
    """Golub-Kahan bidiagonalisation with full reorthogonalisation, until |W^T v - sigma u| <= RESIDUAL sigma."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(matrix.shape[1], dtype=matrix.dtype, generator=generator)
    rights, lefts, alphas, betas = [u / u.norm()], [], [], []
    for step in range(min(rounds, *matrix.shape)):
        left = matrix @ rights[-1] - (betas[-1] * lefts[-1] if lefts else 0)
        left = _orthogonal_to(left, lefts)
        alphas.append(float(left.norm()))
        lefts.append(left / alphas[-1])
        right = _orthogonal_to(matrix.t() @ lefts[-1] - alphas[-1] * rights[-1], rights)
        betas.append(float(right.norm()))
        if step % 10 == 9 or betas[-1] < TINY or step == min(rounds, *matrix.shape) - 1:
            small = torch.diag(torch.tensor(alphas, dtype=matrix.dtype))
            small += torch.diag(torch.tensor(betas[:-1], dtype=matrix.dtype), 1)
            p, values, q = torch.linalg.svd(small)
            if betas[-1] * abs(float(p[-1, 0])) <= RESIDUAL * float(values[0]):
                break
        rights.append(right / betas[-1])
    u, v = torch.stack(rights[: len(alphas)], 1) @ q[0], torch.stack(lefts, 1) @ p[:, 0]
    return Start(float(values[0]), u / u.norm(), v / v.norm())


def _orthogonal_to(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    if basis:
        stacked = torch.stack(tuple(basis))
        for _ in range(2):
            vector = vector - stacked.t() @ (stacked @ vector)
    return vector


class Matrix(NamedTuple):
    """A spectrally normalised matrix as one rank holds it: rows `first_row` ... of W, and the whole u and v."""

    rows: Tensor
    first_row: int
    u: Tensor
    v: Tensor


@torch.no_grad()
def refresh(matrices: Sequence[Matrix], reduce: Callable[[Tensor], None] | None = None) -> None:
    """One power iteration for every matrix, in place: v <- W u / |W u|, u <- W^T v / |W^T v|.

    Where ranks hold different rows, `reduce` sums a flat tensor over ranks in place: one call for all matrices, as
    W^T (W u) is a sum over rows and v only needs the others' rows.
    """
    if not matrices:
        return
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
def estimates(matrices: Sequence[Matrix], reduce: Callable[[Tensor], None] | None = None) -> Tensor:
    """sigma = v^T W u of every matrix, (matrices,): what the forward pass divides by."""
    found = torch.stack(
        [torch.dot(v[first_row : first_row + len(rows)], rows @ u) for rows, first_row, u, v in matrices]
    )
    if reduce is not None:
        reduce(found)
    return found


@torch.no_grad()
def tracking_errors(
    matrices: Sequence[Matrix], reduce: Callable[[Tensor], None] | None = None, iterations: int = 20
) -> Tensor:
    """How far the tracked sigma lies below the one after `iterations` more, relative, (matrices,); nothing changes."""
    copies = [Matrix(rows, first_row, u.clone(), v.clone()) for rows, first_row, u, v in matrices]
    for _ in range(iterations):
        refresh(copies, reduce)
    return 1 - estimates(matrices, reduce) / estimates(copies, reduce)
