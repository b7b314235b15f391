"""A contiguous range of a flattened tensor, which torch.distributed.checkpoint sees as rectangles of the whole.

DeepSpeed cuts tensors anywhere in their row-major order. Saved as rectangles of the whole shape, what one rank holds
can be read back by any engine in any world size, and the other way round.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


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

    `local` is 1-dim and shared, not copied: loading a checkpoint writes into it. Only torch.distributed.checkpoint
    and those who know `local`, `start` and `shape` can use it; it computes nothing.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int) -> "FlatShard":
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        return made  # pyright: ignore[reportReturnType]

    def __init__(self, local: Tensor, shape: Sequence[int], start: int):
        assert local.ndim == 1
        assert 0 <= start <= start + len(local) <= math.prod(shape)
        self.local, self.start = local.detach(), start
        self._rectangles = rectangles(shape, start, start + len(local))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        raise NotImplementedError(f"{func} on a FlatShard: use its `local`")

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"FlatShard({len(self.local)} elements from {self.start} of {tuple(self.shape)})"

    # The names that torch.distributed.checkpoint looks for.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(part.offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(part), properties=properties, size=self.shape),
            )
            for index, part in enumerate(self._rectangles)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(part) for part in self._rectangles]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for part in self._rectangles:
            if torch.Size(part.offsets) == index.offset:
                return self.local[part.start - self.start : part.stop - self.start].view(part.sizes)
        raise KeyError(index)


def _chunk(part: Rectangle) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes))
