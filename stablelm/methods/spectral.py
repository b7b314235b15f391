"""Spectral norms of weights: their start, and the refresh once an optimizer step (sigma reparametrisation).

sigma = v^T W u is kept beside u and v. As u is W^T v / |W^T v|, sigma is |W^T v|, which an update finds on its way.

Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, ICML 2023. The collectives
that a sharded refresh needs live in the engine: it passes a `reduce`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelm.private_names import copy_all

LARGEST_SVD = 128
RESIDUAL = 1e-5
LONGEST, CHECK_EVERY = 300, 10
TINY = 1e-30
STACKED_BYTES = {"cpu": 0, "cuda": 32 * 2**20}
"""How much of equal matrices is copied side by side for one batched product, by type of device.

A GPU then launches a few kernels for dozens of small matrices, and finds the copy in its cache; a matrix that is half
as large is multiplied where it lies. A CPU multiplies one matrix after another several times faster.
"""


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
    """A matrix as one rank holds it: rows `first_row` ... of W (d_out, d_in), and u (d_in,), v (d_out,) and sigma (1,).

    `writes`: whether its rows are features of the stream, not its columns. Without these u, v and sigma are empty
    tensors of that length, on the meta device.
    """

    rows: Tensor
    first_row: int
    u: Tensor
    v: Tensor
    sigma: Tensor
    writes: bool = False


class Slice(NamedTuple):
    """A matrix as one rank holds it: elements `start` ... of the row-major W, the rest as in `Matrix`."""

    values: Tensor
    start: int
    u: Tensor
    v: Tensor
    sigma: Tensor
    writes: bool = False


Part = Matrix | Slice
Reduce = Callable[[Tensor], object]


def vectors(linear: Any, d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and sigma of a `model.linear.Linear`, or of what has its attributes; meta tensors if it lacks one."""
    if all(hasattr(linear, name) for name in ("u", "v", "sigma")):
        return linear.u, linear.v, linear.sigma
    u, v, sigma = torch.empty(d_in + d_out + 1, device="meta").split([d_in, d_out, 1])
    return u, v, sigma


def whole(linear: Any) -> Matrix:
    """All of a `model.linear.Linear`, or of what has its attributes; a collective if its weight is a DTensor."""
    weight = linear.weight.detach()
    rows = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return Matrix(rows, 0, *vectors(linear, *reversed(rows.shape)))


@torch.no_grad()
def squared_rows(matrices: Sequence[Part], reduce: Reduce | None = None) -> list[Tensor]:
    """Squared length of each row of every whole matrix, (d_out,) each; at most one call of `reduce`."""
    return _by_group(_squares, matrices, reduce)


def _squares(group: Sequence[Part]) -> Tensor:
    found = _held(group[0]).new_zeros(len(group), len(group[0].v))
    for places, held in _batches(group):
        for row, _, block in _blocks(group[0], held):
            found[places, row : row + block.shape[-2]] += block.square().sum(dim=-1)
    return found


@torch.no_grad()
def squared_columns(matrices: Sequence[Part], reduce: Reduce | None = None) -> list[Tensor]:
    """Squared length of each column of every whole matrix, (d_in,) each; at most one call of `reduce`."""
    return _by_group(_column_squares, matrices, reduce)


def _column_squares(group: Sequence[Part]) -> Tensor:
    found = _held(group[0]).new_zeros(len(group), len(group[0].u))
    for places, held in _batches(group):
        for _, column, block in _blocks(group[0], held):
            found[places, column : column + block.shape[-1]] += block.square().sum(dim=-2)
    return found


@torch.no_grad()
def refresh(matrices: Sequence[Part], reduce: Reduce | None = None) -> None:
    """One power iteration for every matrix, in place: v <- W u / |W u|, sigma <- |W^T v|, u <- W^T v / sigma.

    Where ranks hold different parts, `reduce` sums a flat tensor over ranks in place, in two calls for all matrices:
    v is rounded before W^T v, so that sigma follows from what a checkpoint holds. All matrices are held in the same
    way, those of one shape in the same part of it.
    """
    if not matrices:
        return
    groups, _ = _by_shape(matrices)
    us = [torch.stack([part.u for part in group]) for group in groups]
    if reduce is None:
        vs, rights = zip(*map(_there_and_back, groups, us), strict=True)
    else:
        vs = [_unit(left) for left in _summed(map(_times, groups, us), reduce)]
        rights = _summed(map(_transposed_times, groups, vs), reduce)
    kept, found = [], []
    for group, v, right in zip(groups, vs, rights, strict=True):
        sigma = _length(right)
        kept += [tensor for part in group for tensor in (part.v, part.u, part.sigma)]
        found += chain.from_iterable(zip(v, right / sigma, sigma, strict=True))
    copy_all(kept, found)


@torch.no_grad()
def find_sigma(matrices: Sequence[Part], reduce: Reduce | None = None) -> None:
    """sigma <- |W^T v| of every matrix, in place: bit for bit what the `refresh` found that left u and v.

    At most one call of `reduce`, of which see `refresh`.
    """
    groups, _ = _by_shape(matrices)
    vs = [torch.stack([part.v for part in group]) for group in groups]
    rights = _summed(map(_transposed_times, groups, vs), reduce)
    copy_all([part.sigma for part in chain(*groups)], list(chain(*map(_length, rights))))


def _length(vectors: Tensor) -> Tensor:
    """(..., 1), so that it can divide them."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _length(vectors)


def _summed(parts: Iterable[Tensor], reduce: Reduce | None) -> list[Tensor]:
    """The sums of tensors over ranks, in one collective."""
    parts = list(parts)
    if reduce is None:
        return parts
    flat = _flat(parts)
    reduce(flat)
    found = flat.split([part.numel() for part in parts])
    return [one.view_as(part) for one, part in zip(found, parts, strict=True)]


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _by_shape(matrices: Sequence[Part]) -> tuple[list[list[Part]], list[int]]:
    """The matrices of each shape, in an order that is the same on all ranks, and the place there of each matrix."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, part in enumerate(matrices):
        found.setdefault((len(part.v), len(part.u)), []).append(place)
    order = list(chain.from_iterable(found.values()))
    groups = [[matrices[place] for place in places] for places in found.values()]
    return groups, sorted(range(len(order)), key=order.__getitem__)


def _by_group(
    measure: Callable[[Sequence[Part]], Tensor], matrices: Sequence[Part], reduce: Reduce | None
) -> list[Tensor]:
    """A row of `measure` for each matrix, summed over ranks."""
    if not matrices:
        return []
    groups, places = _by_shape(matrices)
    rows = list(chain.from_iterable(_summed(map(measure, groups), reduce)))
    return [rows[place] for place in places]


def _held(part: Part) -> Tensor:
    """What this rank holds, beside the vectors."""
    held = part.values if isinstance(part, Slice) else part.rows
    return held if part.u.is_meta else held.to(part.u.device, non_blocking=True)


def _batches(group: Sequence[Part]) -> Iterator[tuple[int | slice, Tensor]]:
    """(place in the group, what this rank holds) of a matrix, or of several, stacked."""
    held = _held(group[0])
    size = max(1, STACKED_BYTES.get(held.device.type, STACKED_BYTES["cuda"]) // max(1, held.nbytes))
    for first in range(0, len(group), size):
        batch = [_held(part) for part in group[first : first + size]]
        yield (first, batch[0]) if len(batch) == 1 else (slice(first, first + size), torch.stack(batch))


def _blocks(part: Part, held: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column, (..., rows, columns)) of what is held of matrices, cut as `part` is.

    held: (..., rows, d_in), or (..., elements), which are a partial first row, rows and a partial last row.
    """
    if isinstance(part, Matrix):
        yield part.first_row, 0, held
        return
    width, begin, size = len(part.u), 0, len(part.values)
    while begin < size:
        row, column = divmod(part.start + begin, width)
        rows = 0 if column else (size - begin) // width
        end = begin + rows * width if rows else min(begin + width - column, size)
        yield row, column, held[..., begin:end].unflatten(-1, (max(rows, 1), -1))
        begin = end


def _times(group: Sequence[Part], u: Tensor) -> Tensor:
    """This rank's part of the sums W u, (n, d_out); u: (n, d_in)."""
    found = u.new_zeros(len(group), len(group[0].v))
    for places, held in _batches(group):
        for row, column, block in _blocks(group[0], held):
            rows, columns = block.shape[-2:]
            found[places, row : row + rows] += _products(block, u[places, column : column + columns])
    return found


def _transposed_times(group: Sequence[Part], v: Tensor) -> Tensor:
    """This rank's part of the sums W^T v, (n, d_in); v: (n, d_out)."""
    found = v.new_zeros(len(group), len(group[0].u))
    for places, held in _batches(group):
        for row, column, block in _blocks(group[0], held):
            rows, columns = block.shape[-2:]
            found[places, column : column + columns] += _products(block.mT, v[places, row : row + rows])
    return found


def _there_and_back(group: Sequence[Any], u: Tensor) -> tuple[Tensor, Tensor]:
    """v = W u / |W u| and W^T v of whole matrices, (n, d_out) and (n, d_in), reading a `Matrix` once."""
    v, rights = u.new_empty(len(group), len(group[0].v)), []
    for places, held in _batches(group):
        left = _products(held, u[places])
        torch.div(left, _length(left), out=v[places])
        rights.append(_products(held.mT, v[places]))
    return v, _flat(rights).view(len(group), -1)


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """matrices: (..., rows, columns), vectors: (..., columns) -> (..., rows)."""
    return matrices.mv(vectors) if vectors.ndim == 1 else matrices.bmm(vectors[..., None])[..., 0]


@torch.no_grad()
def tracking_errors(matrices: Sequence[Part], reduce: Reduce | None = None, iterations: int = 20) -> Tensor:
    """How far the tracked sigma lies below the one after `iterations` more, relative, (matrices,); nothing changes."""
    copies = [part._replace(u=part.u.clone(), v=part.v.clone(), sigma=part.sigma.clone()) for part in matrices]
    for _ in range(iterations):
        refresh(copies, reduce)
    return 1 - torch.cat([part.sigma for part in matrices]) / torch.cat([part.sigma for part in copies])


def differentiable_sigma(linear: Any) -> Tensor:
    """sigma (1,) of a `model.linear.Linear`, with the gradient of v^T W u by W: v u^T."""
    return _Sigma.apply(linear.weight, linear.sigma, linear.v, linear.u)  # pyright: ignore[reportReturnType]


class _Sigma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, v: Tensor, u: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        ctx.save_for_backward(v, u)
        return sigma.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        v, u = ctx.saved_tensors
        return torch.outer(gradient * v, u).to(ctx.dtype), None, None, None
