"""Tensors put aside in a temporary file, so that memory holds those in use."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablelm.observe.sinks import storage_error


class Shelf:
    """A context whose file has no name, so that it is gone with the process however that ends."""

    def __init__(self, folder: Path):
        """Raises StorageError if `folder` cannot hold a file."""
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise storage_error(folder, error) from error

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """The same CPU tensors, read from the file when they are used. Raises StorageError if it is full."""
        return tuple(self._put(tensor) for tensor in tensors)

    def _put(self, tensor: Tensor) -> Tensor:
        values = tensor.detach().contiguous().numpy()
        start = self._file.seek(0, 2)
        try:
            # Written, not mapped: a full disk is then an error and not a signal.
            self._file.write(values.data)
            self._file.flush()
        except OSError as error:
            raise storage_error(self._folder, error) from error
        # Copy on write, for torch wants memory that it may write to.
        return torch.from_numpy(np.memmap(self._file, values.dtype, "c", start, values.shape))
