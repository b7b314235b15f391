"""The stream of every layer in an unnamed file, so that memory holds what is in use.

torch's saved-tensor hooks (`save_on_cpu`, or hooks that write files) were tried: they offload whatever a layer saves,
which is many times the stream, and leave all weights in memory; a walk that builds one layer at a time needs neither.
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
        remaining = memoryview(tensor.numpy()).cast("B")
        while remaining:
            remaining = remaining[file.write(remaining) :]
        name = f"/dev/fd/{file.fileno()}"
        # The map outlives the descriptor, of which a process has only some hundreds.
        return torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view_as(tensor)
