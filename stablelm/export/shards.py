"""Tensors to safetensors files of a bounded size, one tensor in memory at a time.

save_file of safetensors was tried: it takes a file's tensors all at once, and so holds a shard in memory.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from stablelm.checkpoint.reader import bytes_of
from stablelm.checkpoint.tensor_index import DTYPE_NAMES, Slot, header
from stablelm.export.weights import LazyTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = {"format": "pt"}


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, LazyTensor]], dtype: torch.dtype, *, shard_bytes: int
) -> int:
    """Writes the tensors in `dtype` and returns the number of their values.

    One file `model.safetensors`, or where they have more than `shard_bytes`, files of at most so many (a larger tensor
    has its own) and their index, named as transformers reads them. Raises OSError.
    """
    shards: list[list[tuple[Slot, LazyTensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        slot = Slot(name, DTYPE_NAMES[dtype], tensor.shape)
        if shards[-1] and filled + slot.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((slot, tensor))
        filled += slot.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, dtype)
    slots = [(slot, name) for name, shard in zip(names, shards, strict=True) for slot, _ in shard]
    total = sum(slot.nbytes for slot, _ in slots)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {slot.name: name for slot, name in slots}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total // dtype.itemsize


def _write(path: Path, shard: list[tuple[Slot, LazyTensor]], dtype: torch.dtype) -> None:
    with path.open("xb") as file:
        file.write(header([slot for slot, _ in shard], METADATA))
        for slot, tensor in shard:
            values = tensor.to(dtype)
            assert tuple(values.shape) == slot.shape, slot.name
            file.write(bytes_of(values))
        file.flush()
        os.fsync(file.fileno())
