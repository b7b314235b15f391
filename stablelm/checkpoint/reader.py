"""Reading from the files of `tensors/` what a rank needs, and nothing that they do not hold."""

import math
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import torch
from pydantic import Field

from stablelm import json_text
from stablelm.checkpoint import saved_run, selection
from stablelm.checkpoint.manifest import TENSORS, read_commit
from stablelm.checkpoint.remote_path import FULL, UNWRITABLE, CheckpointPath, StoreError, checkpoint_path
from stablelm.checkpoint.tensor_index import (
    INDEX,
    Checked,
    Dtype,
    Slot,
    TensorIndex,
    header,
    name_in_file,
    read_index,
    reason,
)
from stablelm.engine.tensor_parts import Part, part_of
from stablelm.errors import CheckpointError, ConfigError, StorageError
from stablelm.new_files import sync_directory
from stablelm.optimizers import catalogue
from stablelm.optimizers.interface import Update

MODEL_PREFIX = "model."
THREADS = 2
"""Files read side by side."""
BUFFER = 1 << 16
LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""


class Reader:
    """Reads the tensors of a directory's index. Raises CheckpointError where the files do not agree with it."""

    def __init__(self, directory: CheckpointPath, index: TensorIndex):
        self.directory, self.index = directory, index
        self._starts: dict[str, dict[str, int]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU; nothing is allocated before the files prove that they hold it."""
        entry = self.index.tensors[name]
        with _damaged(self.directory):
            for file in {piece.file for piece in entry.pieces}:
                with self._open(file):
                    pass
        tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
        self.read({name: part_of(tensor, 0, 1)})
        return tensor

    def read(self, parts: dict[str, Part]) -> None:
        """Fills `local` of every part: several files side by side, each in the order of its bytes."""
        wanted: dict[str, list[_Read]] = {}
        scattered = []
        for name, part in parts.items():
            flat = part.local.reshape(-1)
            if not part.local.is_contiguous():
                scattered.append((part.local, flat))
            for file, read in self._reads(name, part, flat):
                wanted.setdefault(file, []).append(read)
        with _damaged(self.directory), ThreadPoolExecutor(THREADS) as pool:
            for thread in [pool.submit(self._read_file, file, reads) for file, reads in wanted.items()]:
                thread.result()
        for local, flat in scattered:
            local.copy_(flat.view(local.shape))

    def _reads(self, name: str, part: Part, flat: torch.Tensor) -> "Iterator[tuple[str, _Read]]":
        entry = self.index.tensors[name]
        for piece in entry.pieces:
            begin = piece.start(entry.shape)
            first, stop = max(begin, part.start), min(begin + piece.count, part.stop)
            if first < stop:
                slot = name_in_file(name, entry.shape, piece.offsets, piece.sizes)
                skipped = (first - begin) * entry.torch_dtype.itemsize
                yield piece.file, _Read(slot, skipped, flat[first - part.start : stop - part.start])

    def _read_file(self, name: str, reads: "list[_Read]") -> None:
        with self._open(name) as file:
            starts = self._starts[name]
            for read in sorted(reads, key=lambda read: starts[read.slot] + read.skipped):
                file.seek(starts[read.slot] + read.skipped)
                target = read.target if read.target.is_cpu else torch.empty_like(read.target, device="cpu")
                _fill(file, bytes_of(target), name)
                if target is not read.target:
                    read.target.copy_(target)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        """A tensor file whose header was compared with the index."""
        path = self.directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{name} does not exist, or is not a file")
        with path.open("rb", buffering=BUFFER) if isinstance(path, Path) else path.open("rb") as file:
            if name not in self._starts:
                try:
                    self._starts[name] = read_header(file, path.stat().st_size, self.index.files[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {reason(error)}") from error
            yield file


class _Read(NamedTuple):
    """What to read of one piece: from `skipped` bytes behind its start on, into contiguous elements."""

    slot: str
    skipped: int
    target: torch.Tensor


def _fill(file: IO[bytes], rest: memoryview, name: str) -> None:
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{name} is cut short")
        rest = rest[count:]


@contextmanager
def _damaged(directory: CheckpointPath) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"the tensors in {directory} are damaged ({reason(error)}): load another checkpoint"
        ) from error


class _HeaderEntry(Checked):
    dtype: Dtype
    shape: Annotated[list[json_text.Count], Field(max_length=16)]
    data_offsets: Annotated[list[json_text.Count], Field(min_length=2, max_length=2)]


def read_header(file: IO[bytes], size: int, wanted: Iterable[Slot]) -> dict[str, int]:
    """Where each tensor of a safetensors file of `size` bytes begins in it, by name.

    Raises ValueError unless it holds exactly `wanted`, with no byte left over.
    """
    length = struct.unpack("<Q", head)[0] if len(head := file.read(8)) == 8 else size
    if not 0 < length <= min(size - 8, LARGEST_HEADER):
        raise ValueError("its header is longer than it or the format allows")
    held = json_text.load(file.read(length))
    if not isinstance(held, dict):
        raise ValueError("its header is not an object")
    held.pop("__metadata__", None)
    entries = json_text.checked(held, dict[str, _HeaderEntry])
    if {Slot(name, each.dtype, tuple(each.shape)) for name, each in entries.items()} != set(wanted):
        raise ValueError(f"its header does not agree with {INDEX}")
    reached = 0
    for name, each in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = each.data_offsets
        if start != reached or stop - start != Slot(name, each.dtype, tuple(each.shape)).nbytes:
            raise ValueError(f"the bytes of {name} are not where they must be")
        reached = stop
    if 8 + length + reached != size:
        raise ValueError(f"it has {size} bytes instead of {8 + length + reached}")
    return {name: 8 + length + each.data_offsets[0] for name, each in entries.items()}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU that is not empty."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _evaluated(reader: Reader, name: str, update: Update) -> torch.Tensor:
    """A weight, that of evaluations where gradients are taken at another. Raises CheckpointError without its state."""
    tensor, of_name = reader.tensor(name), f"optim.{name.removeprefix(MODEL_PREFIX)}"
    needed = [f"{of_name}.{state}" for state in update.evaluation_state()]
    if not needed or f"{of_name}.step" not in reader.index.tensors:
        return tensor
    if missing := [each for each in needed if each not in reader.index.tensors]:
        raise CheckpointError(f"{reader.directory} lacks {missing[0]}, without which its weights are not known")
    state = dict(zip(update.evaluation_state(), map(reader.tensor, needed), strict=True))
    evaluated = update.evaluated(tensor, state)
    return tensor if evaluated is None else evaluated


def consolidate(checkpoint: str, out: Path, *, elsewhere: str | None = None) -> str:
    """Writes the weights, named as in the decoder, to a new file; returns a line that says what is in it.

    `elsewhere`: where a run has its checkpoints, if not in its directory.

    Tensors go through memory one at a time. Raises CheckpointError for a missing or damaged checkpoint, ConfigError
    where `out` cannot be made, StorageError where it cannot be written to the end.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already; name a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist; create it first")
    found = selection.resolve_checkpoint(checkpoint, elsewhere=checkpoint_path(elsewhere) if elsewhere else None)
    reader = Reader(found / TENSORS, read_index(found / TENSORS))
    held = reader.index.tensors
    slots = {name: Slot(name.removeprefix(MODEL_PREFIX), held[name].dtype, held[name].shape) for name in sorted(held)}
    weights = {name: slot for name, slot in slots.items() if name.startswith(MODEL_PREFIX)}
    update = catalogue.find(saved_run.saved(found).train)
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(header(weights.values(), {"format": "pt", "step": str(read_commit(found).step)}))
            for name in weights:
                tensor = _evaluated(reader, name, update)
                file.write(bytes_of(tensor) if tensor.numel() else b"")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        if error.errno in FULL | UNWRITABLE:
            raise StorageError(f"cannot write {out} ({error.strerror})") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    elements = sum(math.prod(slot.shape) for slot in weights.values())
    return f"{out}: {len(weights)} tensors, {elements / 1e6:.2f} M elements of {found}"
