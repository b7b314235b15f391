"""A flat range of a tensor saved and loaded as rectangles, between world sizes and beside whole tensors."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.engine.tensor_parts import FlatShard, rectangles

SHAPES = {"matrix": (7, 5), "vector": (11,), "cube": (3, 4, 5), "scalar": (), "short": (2,)}


@pytest.mark.parametrize("shape", SHAPES.values())
def test_rectangles_cover_exactly_the_range(shape: tuple[int, ...]):
    size = math.prod(shape)
    whole = torch.arange(size).view(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            parts = rectangles(shape, start, stop)
            assert len(parts) <= max(1, 2 * len(shape) - 1)
            seen: list[int] = []
            for part in parts:
                block = whole
                for dimension, (offset, length) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                    block = block.narrow(dimension, offset, length)
                assert block.numel() == part.stop - part.start
                seen += block.flatten().tolist()
            assert seen == list(range(start, stop))
            assert all(before.stop == after.start for before, after in pairwise(parts))


def value(name: str) -> torch.Tensor:
    size = math.prod(SHAPES[name])
    return torch.arange(size, dtype=torch.float32).view(SHAPES[name]) + 100 * len(name)


def cut(name: str, rank: int, world_size: int, fill: float | None = None) -> FlatShard:
    """This rank's part when all tensors follow one another and the whole is cut evenly, as ZeRO-1 does."""
    offset = sum(math.prod(SHAPES[other]) for other in list(SHAPES)[: list(SHAPES).index(name)])
    total, size = sum(map(math.prod, SHAPES.values())), math.prod(SHAPES[name])
    first, stop = (min(max(r * total // world_size - offset, 0), size) for r in (rank, rank + 1))
    local = value(name).flatten()[first:stop].clone()
    return FlatShard(local if fill is None else torch.full_like(local, fill), SHAPES[name], first)


def save(rank: int, world_size: int, directory: Path) -> None:
    shards: dict[str, torch.Tensor] = {name: cut(name, rank, world_size) for name in SHAPES}
    save_tensors(directory, shards, torch.distributed.group.WORLD)


def load(rank: int, world_size: int, directory: Path) -> list[bool]:
    shards = {name: cut(name, rank, world_size, fill=-1.0) for name in SHAPES}
    load_tensors(directory, dict(shards), torch.distributed.group.WORLD)
    return [torch.equal(shard.local, cut(name, rank, world_size).local) for name, shard in shards.items()]


def test_three_ranks_save_one_process_and_two_ranks_load(tmp_path: Path):
    run_ranks(save, 3, tmp_path / "three")
    whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    load_tensors(tmp_path / "three", dict(whole), None)
    assert all(torch.equal(whole[name], value(name)) for name in SHAPES)
    save_tensors(tmp_path / "one", dict(whole), None)
    assert all(all(rank) for rank in run_ranks(load, 2, tmp_path / "one"))


def test_a_shard_shows_the_whole_shape_and_writes_into_its_storage(tmp_path: Path):
    storage = torch.zeros(10)
    shard = FlatShard(storage[2:8], (2, 3), 0)
    assert (shard.shape, shard.dtype, shard.local.data_ptr()) == ((2, 3), torch.float32, storage[2:].data_ptr())
    save_tensors(tmp_path / "tensors", {"a": torch.ones(2, 3)}, None)
    load_tensors(tmp_path / "tensors", {"a": shard}, None)
    assert storage.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(NotImplementedError, match="use its `local`"):
        _ = shard + 1
    with pytest.raises(AssertionError):
        FlatShard(torch.zeros(4), (2, 3), 3)
