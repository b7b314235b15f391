"""How a tensor becomes bytes in a file, quickly: hashed on the way, and what equal shapes have in common made once."""

import io
import os
from collections.abc import Callable
from hashlib import sha256
from typing import IO, Any

import torch

SMALL_BYTES = 1 << 16
LARGEST_MOULDED = 64 << 20
SYNC_BYTES = 16 << 20
"""Forced to the disk as soon as there are so many, while other threads hash."""


class HashingStream:
    """Passes writes on and hashes them on the way; small ones, of which torch.save makes dozens a tensor, in one go."""

    def __init__(self, raw: IO[bytes], *, sync: bool, failed: Callable[[OSError], None]):
        self.raw, self._sync, self._failed = raw, sync, failed
        self.digest, self.size, self.synced = sha256(), 0, 0
        self.gathered = bytearray()

    def write(self, content: Any) -> int:
        count = memoryview(content).nbytes
        self.size += count
        if count < SMALL_BYTES:
            self.gathered += content
        if count >= SMALL_BYTES or len(self.gathered) >= SMALL_BYTES:
            self.write_gathered()
        if count >= SMALL_BYTES:
            self._write(content)
        return count

    def write_gathered(self) -> None:
        if self.gathered:
            content, self.gathered = self.gathered, bytearray()
            self._write(content)

    def _write(self, content: Any) -> None:
        try:
            self.raw.write(content)
            if self.size - self.synced >= SYNC_BYTES and self._sync:
                os.fdatasync(self.fileno())
                self.synced = self.size
        except OSError as error:
            self._failed(error)  # torch.save hides it behind a RuntimeError of its own
            raise
        self.digest.update(content)

    def flush(self) -> None:
        """Nothing: torch asks for it after each tensor."""

    def close(self) -> None:
        """Nothing: create_stream closes."""

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.write_gathered()
        self.raw.flush()  # what is asked for is an fsync, which must find everything in the file
        return self.raw.fileno()


class Moulds:
    """torch.save for many tensors of few shapes.

    Saved without checksums, tensors of equal shape and dtype differ in their own bytes alone; what stands around those
    is made once. A model of a thousand thin layers spends most of its saving on that otherwise.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}

    def save(self, tensor: torch.Tensor, stream: HashingStream) -> None:
        """Writes what torch.save would, for a contiguous tensor of the CPU."""
        if not 0 < tensor.nbytes <= LARGEST_MOULDED:
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save takes all of a storage along
            torch.save(tensor, stream)  # type: ignore[arg-type]
            return
        key = tensor.dtype, tensor.shape
        if key not in self._made:
            torch.save(tensor.clone(), whole := io.BytesIO())
            whole.seek(0)
            start = describe(whole)[1]
            self._made[key] = whole.getvalue()[:start], whole.getvalue()[start + tensor.nbytes :]
        before, after = self._made[key]
        stream.write(before)
        stream.write(bytes_of(tensor))
        stream.write(after)


def describe(piece: Any) -> tuple[torch.Tensor, int]:
    """A saved tensor without its bytes, and where those begin. Executes nothing."""
    described = torch.load(piece, map_location="meta", weights_only=True)
    if not isinstance(described, torch.Tensor):
        raise ValueError("it holds something else than a tensor")
    return described, described.untyped_storage()._checkpoint_offset or 0


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU that is not empty."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
