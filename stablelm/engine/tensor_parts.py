"""Which elements of a tensor a rank holds: one range of the row-major order of the whole, however an engine cuts it.

DeepSpeed cuts tensors anywhere in that order, FSDP2 between rows. Saved as rectangles of the whole shape, what one
rank holds can be read back by any engine in any world size, and the other way round.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from stablelm.private_names import wrapper_tensor

_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|module)\.")


def clean_name(name: str) -> str:
    """The parameter's name without what compile, recompute and data-parallel wrappers put into it."""
    return _WRAPPER.sub("", name)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Rectangle(NamedTuple):
    """A block of a tensor: its corner and sizes, and where it begins in the row-major order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.sizes)


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """The flat range [start, stop) of a tensor of `shape` as blocks in order: at most 2 ndim - 1 of them.

    An empty range gives none; a scalar is one block without dimensions.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Rectangle((start,) * len(shape), (stop - start,) * len(shape), start)]
    rest, row = shape[1:], math.prod(shape[1:])
    found: list[Rectangle] = []
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        return _in_row(rest, last, row, start, stop)
    if start < first * row:
        found += _in_row(rest, first - 1, row, start, first * row)
    if first < last:
        found.append(Rectangle((first, *(0 for _ in rest)), (last - first, *rest), first * row))
    if last * row < stop:
        found += _in_row(rest, last, row, last * row, stop)
    return found


def _in_row(rest: Sequence[int], index: int, row: int, start: int, stop: int) -> list[Rectangle]:
    """The flat range [start, stop), which lies in row `index`, of the tensor of which a row has shape `rest`."""
    inner = rectangles(rest, start - index * row, stop - index * row)
    return [Rectangle((index, *part.offsets), (1, *part.sizes), part.start + index * row) for part in inner]


class FlatShard(Tensor):
    """This rank's elements [start, start + len(local)) of a tensor of `shape`; none if `local` is empty.

    `local` is 1-dim and shared, not copied: loading a checkpoint writes into it. `copies` ranks hold the same elements,
    and this one is the `copy`-th of them. Only those who know these attributes can use it; it computes nothing.
    """

    local: Tensor
    start: int
    copies: int
    copy: int

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int, *, copies: int = 1, copy: int = 0) -> "FlatShard":
        return wrapper_tensor(cls, shape, local)

    def __init__(self, local: Tensor, shape: Sequence[int], start: int, *, copies: int = 1, copy: int = 0):
        assert local.ndim == 1
        assert 0 <= start <= start + len(local) <= math.prod(shape)
        self.local, self.start = local.detach(), start
        self.copies, self.copy = copies, copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        raise NotImplementedError(f"{func} on a FlatShard: use its `local`")

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"FlatShard({len(self.local)} elements from {self.start} of {tuple(self.shape)})"


class Part(NamedTuple):
    """What a rank holds of a tensor: `local`, of any shape, has its elements [start, stop) in row-major order.

    `copies` ranks hold the same elements; this one is the `copy`-th of them.
    """

    local: Tensor
    shape: torch.Size
    start: int
    copies: int
    copy: int

    @property
    def stop(self) -> int:
        return self.start + self.local.numel()


def part_of(tensor: Tensor, rank: int, world_size: int) -> Part:
    """The part of a plain tensor (equal on all of `world_size` ranks), a FlatShard, or a DTensor sharded in rows."""
    if isinstance(tensor, FlatShard):
        return Part(tensor.local, tensor.shape, tensor.start, tensor.copies, tensor.copy)
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), tensor.shape, 0, world_size, rank)
    coordinate, mesh = tensor.device_mesh.get_coordinate(), tensor.device_mesh
    assert coordinate is not None, "a tensor of a mesh that this rank is not in"
    row, rows, copies, copy = 0, tensor.shape[0] if tensor.ndim else 0, 1, 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            copies, copy = copies * mesh.size(axis), copy * mesh.size(axis) + coordinate[axis]
            continue
        assert type(placement) is Shard and placement.dim == 0, f"{placement}: only shards of rows can be saved"
        each = -(-rows // mesh.size(axis))  # as torch.chunk: the last ones may be short or empty
        skipped = min(coordinate[axis] * each, rows)
        row, rows = row + skipped, min(each, rows - skipped)
    local = tensor.to_local().detach()
    assert not tensor.ndim or local.shape == (rows, *tensor.shape[1:]), f"{local.shape} held, not {rows} rows"
    return Part(local, tensor.shape, row * math.prod(tensor.shape[1:]), copies, copy)
