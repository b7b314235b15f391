"""The stream of every layer in files without a name, so that memory holds what is in use.

torch's saved-tensor hooks were tried on the whole model: they offload all that layers save, not the stream alone, and
leave the parameters in memory (96 layers of width 256: 1.45 GB of memory and 0.93 GB of files in place of 0.32 and
0.05, in the same time). `torch.from_file` maps what is written here.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from stablelm.errors import StorageError


def unwritable(folder: Path, error: OSError) -> StorageError:
    """One sentence for a folder that cannot be written."""
    reason = error.strerror or error
    return StorageError(f"{folder} cannot be written ({reason}); free some space or name another folder by --out")


def to_disk(tensors: Iterable[Tensor], folder: Path) -> tuple[Tensor, ...]:
    """The same CPU tensors in files of `folder` without a name, from which they are read when they are used.

    The files disappear with the tensors, however the process ends. Raises StorageError if the folder is full.
    """
    try:
        return tuple(_to_disk(tensor.detach().contiguous(), folder) for tensor in tensors)
    except OSError as error:
        raise unwritable(folder, error) from error


def _to_disk(tensor: Tensor, folder: Path) -> Tensor:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        # Written before it is mapped: a full disk is then an error and not a signal.
        remaining = tensor.numpy().data.cast("B")
        while remaining:
            remaining = remaining[file.write(remaining) :]
        name = f"/dev/fd/{file.fileno()}"
        # The map outlives the descriptor, of which a process has only some hundreds.
        return torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view_as(tensor)
