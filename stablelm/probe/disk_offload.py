"""The stream of every layer put aside, so that memory holds what is in use."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.errors import StorageError
from stablelm.methods.stream import Chunks, Concat, Stream
from stablelm.methods.widths import stream_width

SEGMENT, PIECE, ALIGNMENT = 64 * 2**20, 2**20, 64


def unwritable(folder: Path, error: OSError) -> StorageError:
    """One sentence for a folder that does not take what we write."""
    reason = error.strerror or error
    return StorageError(f"{folder} cannot be written ({reason}); make room in it or name another folder by --out")


class Shelf:
    """A context whose file has no name, so that it is gone with the process however that ends."""

    def __init__(self, folder: Path):
        """Raises StorageError if `folder` cannot hold a file."""
        self._folder = folder
        self._segment = np.empty(0, np.uint8)
        self._used = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise unwritable(folder, error) from error

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """The same CPU tensors in the file, from which they are read when they are used; StorageError if it is full."""
        return tuple(self._put(tensor) for tensor in tensors)

    def _put(self, tensor: Tensor) -> Tensor:
        values = tensor.detach().contiguous().numpy()
        if self._used + values.nbytes > len(self._segment):
            self._extend(max(values.nbytes, SEGMENT))
        place = self._segment[self._used : self._used + values.nbytes].view(values.dtype).reshape(values.shape)
        self._used += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        place[...] = values
        return torch.from_numpy(place)

    def _extend(self, size: int) -> None:
        """Maps a new part of the file; a map for each tensor would need a descriptor for each."""
        try:
            start = self._file.seek(0, 2)
            for written in range(0, size, PIECE):
                # Written before it is mapped: a full disk is then an error and not a signal.
                self._file.write(bytes(min(PIECE, size - written)))
            self._file.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self._segment, self._used = np.memmap(self._file, np.uint8, "r+", start, (size,)), 0


class Boundaries(Protocol):
    """The stream after the embedding (0) and after each layer."""

    def add(self, new: Chunks) -> None:
        """Keeps what the embedding, then each layer, gives to the stream."""
        ...

    def at(self, index: int) -> Chunks:
        """The stream at a boundary as a layer takes it."""
        ...


class Kept:
    """On a shelf, chunk by chunk."""

    def __init__(self, stream: Stream, shelf: Shelf):
        self._stream, self._shelf = stream, shelf
        self._boundaries: list[Chunks] = []

    def add(self, new: Chunks) -> None:
        new = self._shelf.put(new)
        self._boundaries.append(self._stream.join(self._boundaries[-1], new) if self._boundaries else new)

    def at(self, index: int) -> Chunks:
        return self._boundaries[index]


class Grown:
    """A concatenated stream, in memory once: each boundary is the beginning of it, as one chunk.

    To read its 2 n_layers + 1 chunks one by one in every layer would cost the square of the depth.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._whole = torch.empty(0)
        self._filled = 0

    def add(self, new: Chunks) -> None:
        if not self._filled:
            self._whole = new[0].new_empty(*new[0].shape[:-1], stream_width(self._config, self._config.n_layers))
        for chunk in new:
            self._whole[..., self._filled : self._filled + chunk.shape[-1]] = chunk
            self._filled += chunk.shape[-1]

    def at(self, index: int) -> Chunks:
        return (self._whole[..., : stream_width(self._config, index)],)


def boundaries(config: ModelConfig, stream: Stream, shelf: Shelf) -> Boundaries:
    """The way to keep a stream of that kind."""
    return Grown(config) if isinstance(stream, Concat) else Kept(stream, shelf)


def shares(gradient: tuple[Tensor, ...], chunks: Chunks) -> tuple[Tensor, ...]:
    """A gradient to the stream as kept, for the chunks of `Stream.join`: one tensor may stand for them side by side."""
    if len(gradient) == len(chunks):
        return gradient
    (whole,) = gradient
    return whole.split([chunk.shape[-1] for chunk in chunks], dim=-1)
