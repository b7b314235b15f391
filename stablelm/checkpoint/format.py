"""Tensors to and from storage: safetensors files of the pieces that ranks hold, under names that all engines share.

Every engine saves under the same clean names (`model.<name>`, `optim.<name>.exp_avg`, ...), so that any engine and
world size can load what another one saved; `index` describes the files. torch's HuggingFaceStorageWriter was tried: it
names a piece by its tensor alone, so that of several rectangles of one tensor on a rank only the last one is in the
file, builds each file in memory, and neither hashes what it writes nor writes to stores.
"""

import heapq
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from stablelm.checkpoint.manifest import FileRecord, write_new
from stablelm.checkpoint.reader import Reader, bytes_of
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.checkpoint.tensor_index import (
    DTYPE_NAMES,
    INDEX,
    Piece,
    Slot,
    TensorEntry,
    TensorIndex,
    header,
    name_in_file,
    read_index,
)
from stablelm.engine.consensus import Consensus
from stablelm.engine.tensor_parts import FlatShard, Part, clean_name, part_of, rectangles
from stablelm.errors import CheckpointError
from stablelm.new_files import sync_directory
from stablelm.printable import few

BYTES_A_FILE = 32 << 20
"""A rank spreads what it writes over more files, one a thread, while each gets at least this many bytes."""
THREADS = 2
"""Files that a rank writes or reads side by side: hashing and the disk do not wait for each other."""
SYNC_BYTES = 16 << 20
"""Forced to the disk as soon as there are so many, while other threads hash."""
WRITE_BUFFER = 1 << 16
"""Smaller pieces are gathered to so many bytes; larger ones are not copied."""
Read = Callable[[str], torch.Tensor]
"""The whole tensor of a name, on the CPU."""
_Row = tuple[str, str, tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...], str]]
"""A piece in a file: tensor, dtype, whole shape, (offsets, sizes, file)."""


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the whole (unsharded) tensors."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


def save_tensors(
    directory: CheckpointPath,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    reached: Callable[[str], None] = lambda part: None,
    read: Read | None = None,
) -> dict[str, FileRecord]:
    """Writes plain tensors (equal on all ranks), DTensors and FlatShards of any device into a new directory.

    With `read`, in one process, they are empty ones of the meta device, and each is read when it is written, by up to
    THREADS threads. Collective over `group` (gloo; None: one process). Returns the records of the files that this rank
    wrote, by name; they are on the disk. Equal tensors give equal files. Raises OSError; what another rank failed with
    arrives as a RuntimeError.
    """
    consensus, rank = Consensus(group, _rank(group), reached), _rank(group)
    records: dict[str, FileRecord] = {}
    written: list[_Row] = []

    def write() -> None:
        for name, tensor in tensors.items():
            assert isinstance(tensor, torch.Tensor), f"{name} is not a tensor: other values belong into the state"
            assert name == clean_name(name), f"{name} carries a wrapper's prefix"
        files = _share_out(list(_pieces(own_parts(tensors, group))), f"rank-{rank:05d}")
        if isinstance(directory, Path):
            directory.mkdir(exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            threads = {name: pool.submit(_write_file, directory / name, pieces, read) for name, pieces in files.items()}
        records.update({name: thread.result() for name, thread in threads.items()})
        if isinstance(directory, Path):
            sync_directory(directory)
        written.extend(piece.row(file) for file, pieces in files.items() for piece in pieces)

    consensus.run(write, "tensor files")
    of_all = _gathered(written, group)

    def describe() -> None:
        records[INDEX] = write_new(directory / INDEX, _index(tensors, of_all).model_dump_json().encode())
        if isinstance(directory, Path):
            sync_directory(directory)

    consensus.first(describe, "index")
    return records


def sample(
    tensors: dict[str, torch.Tensor], limit: int, group: dist.ProcessGroup | None
) -> tuple[dict[str, torch.Tensor], float]:
    """Up to `limit` bytes of what this rank would write, and how many times as much all of it is (at least 1)."""
    parts = own_parts(tensors, group)
    taken: dict[str, torch.Tensor] = {}
    left, total = limit, 0
    for name, part in parts.items():
        size = part.local.dtype.itemsize
        count = min(part.local.numel(), left // size)
        if count:
            taken[name] = FlatShard(part.local.reshape(-1)[:count], part.shape, part.start)
        left, total = left - count * size, total + part.local.nbytes
    return taken, total / (limit - left) if left < limit else 1.0


class _WrittenPiece(NamedTuple):
    """A piece that this rank writes; its elements are contiguous, on any device."""

    tensor: str
    shape: torch.Size
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    elements: torch.Tensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.elements.itemsize

    @property
    def slot(self) -> Slot:
        name = name_in_file(self.tensor, self.shape, self.offsets, self.sizes)
        return Slot(name, DTYPE_NAMES[self.elements.dtype], self.sizes)

    def row(self, file: str) -> _Row:
        dtype = DTYPE_NAMES[self.elements.dtype]
        return self.tensor, dtype, tuple(self.shape), (self.offsets, self.sizes, file)


def own_parts(tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, Part]:
    """The parts that this rank writes: tensors that several ranks hold are divided among them, the largest first."""
    rank, size = _rank(group), 1 if group is None else dist.get_world_size(group)
    parts = {name: part_of(tensor, rank, size) for name, tensor in tensors.items()}
    loads: dict[int, list[tuple[int, int]]] = {}
    own = {}
    for name in sorted(parts, key=lambda name: (-tensor_bytes({name: tensors[name]}), name)):
        part = parts[name]
        heap = loads.setdefault(part.copies, [(0, copy) for copy in range(part.copies)])
        load, copy = heap[0]
        heapq.heapreplace(heap, (load + tensor_bytes({name: tensors[name]}), copy))
        if copy == part.copy:
            own[name] = part
    return own


def _pieces(parts: dict[str, Part]) -> Iterator[_WrittenPiece]:
    for name, part in parts.items():
        flat = part.local.reshape(-1)
        for block in rectangles(part.shape, part.start, part.stop):
            elements = flat[block.start - part.start : block.stop - part.start]
            yield _WrittenPiece(name, part.shape, block.offsets, block.sizes, elements)


def _share_out(pieces: list[_WrittenPiece], stem: str) -> dict[str, list[_WrittenPiece]]:
    """A few files of about equal size, each in the order in which its bytes are aligned without gaps."""
    size = sum(piece.nbytes for piece in pieces)
    count = min(len(pieces), max(1, min(THREADS, size // BYTES_A_FILE)))
    heap, files = [(0, index) for index in range(count)], [[] for _ in range(count)]
    for piece in sorted(pieces, key=lambda piece: (-piece.nbytes, piece.tensor, piece.offsets)):
        load, index = heap[0]
        heapq.heapreplace(heap, (load + piece.nbytes, index))
        files[index].append(piece)
    for file in files:
        file.sort(key=lambda piece: (-piece.elements.itemsize, piece.tensor, piece.offsets))
    return {f"{stem}-{index}.safetensors": file for index, file in enumerate(files)}


def _write_file(path: CheckpointPath, pieces: list[_WrittenPiece], read: Read | None) -> FileRecord:
    """Writes, hashes and forces to the disk as it goes."""
    digest, size, synced = sha256(), 0, 0
    with path.open("xb", buffering=WRITE_BUFFER) if isinstance(path, Path) else path.open("wb") as file:
        for content in _contents(pieces, read):
            file.write(content)
            digest.update(content)
            size += len(content)
            if isinstance(path, Path) and size - synced >= SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                synced = size
        if isinstance(path, Path):
            file.flush()
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _contents(pieces: list[_WrittenPiece], read: Read | None) -> Iterator[bytes | memoryview]:
    yield header([piece.slot for piece in pieces], {"format": "pt"})
    for piece in pieces:
        elements = piece.elements.cpu() if read is None else read(piece.tensor)
        assert (elements.dtype, elements.numel()) == (piece.elements.dtype, piece.elements.numel()), piece.tensor
        content = bytes_of(elements.reshape(-1))  # little-endian, as all that torch runs on
        for start in range(0, len(content), SYNC_BYTES):
            yield content[start : start + SYNC_BYTES]


def _gathered(written: list[_Row], group: dist.ProcessGroup | None) -> list[_Row]:
    """What all ranks wrote, on rank 0; nothing on the others."""
    if group is None:
        return written
    of_ranks: list = [None] * dist.get_world_size(group) if _rank(group) == 0 else []
    dist.gather_object(written, of_ranks or None, group=group, group_dst=0)
    return [row for rows in of_ranks for row in rows]


def _index(tensors: dict[str, torch.Tensor], written: list[_Row]) -> TensorIndex:
    """The pieces that were written, and every tensor of this rank even if nothing of it was."""
    kinds = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for name, dtype, shape, piece in sorted(written):
        assert kinds.setdefault(name, (dtype, shape)) == (dtype, shape), f"{name} differs between ranks"
        pieces.setdefault(name, []).append(Piece.model_construct(offsets=piece[0], sizes=piece[1], file=piece[2]))
    entries = {
        name: TensorEntry.model_construct(dtype=kinds[name][0], shape=kinds[name][1], pieces=tuple(found))
        for name, found in sorted(pieces.items())
    }
    return TensorIndex.model_construct(tensors=entries)  # checked where it is read, as before a commit


def load_tensors(
    directory: CheckpointPath,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    *,
    partial: bool = False,
) -> None:
    """Fills `tensors` (plain, DTensor or FlatShard, any device) in place from a directory that save_tensors wrote.

    Collective over `group` (None: one process); its world size and sharding may differ from the writer's. Names,
    shapes and dtypes must agree with the checkpoint, which may hold more names only if `partial`. Raises
    CheckpointError on all ranks, before any tensor is touched unless a file proves damaged while it is read.
    """
    rank, size = _rank(group), 1 if group is None else dist.get_world_size(group)
    consensus = Consensus(group, rank)
    reader: list[Reader] = []

    # All ranks compare first: one that fails alone would leave the others waiting, or loaded.
    def compare() -> None:
        reader.append(Reader(directory, read_index(directory)))
        _compare(directory, tensors, reader[0].index, partial)

    consensus.run(compare)
    consensus.run(lambda: reader[0].read({name: part_of(tensor, rank, size) for name, tensor in tensors.items()}))


def _compare(directory: CheckpointPath, tensors: dict[str, torch.Tensor], index: TensorIndex, partial: bool) -> None:
    held = index.tensors
    missing = sorted(tensors.keys() - held.keys())
    unexpected = [] if partial else sorted(held.keys() - tensors.keys())
    different = [
        f"{name} ({_described(held[name].shape, held[name].torch_dtype)} in the checkpoint, "
        f"{_described(tensor.shape, tensor.dtype)} here)"
        for name, tensor in sorted(tensors.items())
        if name in held and (held[name].shape, held[name].torch_dtype) != (tensor.shape, tensor.dtype)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "different": different}
    problems = [f"{kind}: {few(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"the tensors in {directory} do not fit this model ({'; '.join(problems)}): "
            "use the configuration that the checkpoint was trained with"
        )
    partly = sorted(name for name in tensors if not held[name].complete)
    if partly:
        raise CheckpointError(
            f"the tensors in {directory} are not complete ({few(partly)} incomplete): load another checkpoint"
        )


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape)) or 'scalar'} {str(dtype).removeprefix('torch.')}"


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
