"""torch.distributed.checkpoint's own files, written and hashed side by side, and read without executing anything."""

import math
import os
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from stablelm.checkpoint.files import FileRecord
from stablelm.checkpoint.places import Place, StoreError
from stablelm.checkpoint.streams import HashingStream, Moulds, bytes_of, describe
from stablelm.errors import CheckpointError

METADATA = ".metadata"
BYTES_A_FILE = 32 << 20
"""A rank spreads what it writes over more files, one a thread, while each gets at least this many bytes."""
THREADS = 2
"""Files that a rank writes or reads side by side: hashing and the disk do not wait for each other."""
_PIECE = re.compile(r"__\d+_\d+\.distcp")
_ALLOWED = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
}
_ALLOWED |= {("torch", str(kind).split(".")[1]): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def read_metadata(directory: Place) -> metadata.Metadata:
    """Which tensors a directory holds, and where. Raises CheckpointError; executes nothing."""
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            description = _Unpickler(file).load()
        _check(description)
    except StoreError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): it is no checkpoint, or an incomplete one"
        ) from error
    except Exception as error:  # bytes that are no pickle raise nearly anything
        raise CheckpointError(f"refused to read {path} ({error}): load another checkpoint") from error
    return description


class _Unpickler(pickle.Unpickler):
    """Builds the classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs") from None


def _check(description: Any) -> None:
    """Raises ValueError unless all entries are whole tensors whose pieces lie in files of the directory."""
    if not isinstance(description, metadata.Metadata):
        raise ValueError("it does not describe a checkpoint")
    stored = description.storage_data
    for name, entry in description.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"{name} is not whole")
        if any(metadata.MetadataIndex(name, chunk.offsets) not in stored for chunk in entry.chunks):
            raise ValueError(f"a piece of {name} is stored nowhere")
    for place in stored.values():
        if not _PIECE.fullmatch(place.relative_path) or place.transform_descriptors:
            raise ValueError(f"it points to {place.relative_path!r}, which is no tensor file")


class Writer(filesystem.FileSystemWriter):
    """Writes a rank's pieces to new files of `directory`; `records` and `failure` say how that went."""

    def __init__(self, directory: Place):
        super().__init__(".", sync_files=isinstance(directory, Path), overwrite=False)
        self.path: Any = directory
        self.files = self.fs = _HashingFiles(self.sync_files)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """A few files of about equal size, side by side."""
        size = sum(filesystem._item_size(item) for item in plan.items)
        count = max(1, min(THREADS, size // BYTES_A_FILE))
        buckets = enumerate(filesystem._split_by_size_and_type(count, plan.items))
        with _no_checksums(), ThreadPoolExecutor(count) as pool:
            threads = [
                pool.submit(self._write_file, f"{plan.storage_data.prefix}{index}.distcp", bucket, planner)
                for index, bucket in buckets
            ]
        future: Future = Future()
        future.set_result([written for thread in threads for written in thread.result()])
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        written, moulds = [], Moulds()
        with self.files.create_stream(self.path / name, "wb") as stream:
            for item in items:
                start = stream.tell()
                moulds.save(planner.resolve_data(item).detach().cpu().contiguous(), stream)  # type: ignore[union-attr]
                length = stream.tell() - start
                written.append(WriteResult(item.index, length, filesystem._StorageInfo(name, start, length)))
            if self.sync_files:
                os.fsync(stream.fileno())
        return written

    def finish(self, metadata: metadata.Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what torch does, but in one go: a store cannot rename, and COMMITTED says what is whole."""
        metadata.version = filesystem.CURRENT_DCP_VERSION
        metadata.storage_data = {one.index: one.storage_data for of_rank in results for one in of_rank}
        metadata.storage_meta = self.storage_meta()
        with self.files.create_stream(self.path / METADATA, "wb") as file:
            pickle.dump(metadata, file)
            if self.sync_files:
                os.fsync(file.fileno())

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # no path and no random name: equal tensors give equal files


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Leaves out torch.save's own crc32 of every tensor, which loading ignores: what we hash needs it not."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _HashingFiles(filesystem.FileSystem):
    """Files of a folder or store, which also records what was written."""

    def __init__(self, sync: bool) -> None:
        self.sync = sync
        self.records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator["HashingStream"]:
        assert mode == "wb"
        try:
            with path.open(mode) as raw:
                stream = HashingStream(raw, sync=self.sync, failed=self._failed)
                yield stream
                stream.write_gathered()
        except OSError as error:
            self._failed(error)
            raise
        self.records[path.name] = FileRecord(stream.size, stream.digest.hexdigest())

    def _failed(self, error: OSError) -> None:
        self.failure = error

    def mkdir(self, path: Any) -> None:
        if isinstance(path, Path):
            path.mkdir(exist_ok=True)

    def exists(self, path: Any) -> bool:
        return path.exists()

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix


class Reader(filesystem.FileSystemReader):
    """torch's reader over metadata that was checked before; bytes go straight where they belong if they can."""

    def __init__(self, directory: Place, description: metadata.Metadata):
        super().__init__(".")
        self.path: Any = directory
        self.description = description

    # Without **kwargs, or torch would go on to unpickle other files when this one fails.
    def read_metadata(self) -> metadata.Metadata:
        return self.description

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        """Several files side by side, each in the order of its bytes."""
        files: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset):
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        with ThreadPoolExecutor(THREADS) as pool:
            for thread in [pool.submit(self._read_file, name, items, planner) for name, items in files.items()]:
                thread.result()
        future: Future = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        known: dict[int, tuple[bytes, torch.Tensor]] = {}
        with torch.no_grad(), (self.path / name).open("rb") as file:
            for item in items:
                target = planner.resolve_tensor(item).detach()
                self._fill(target, file, item, known)
                planner.commit_tensor(item, target)

    def _fill(self, target: torch.Tensor, file: IO[bytes], item: ReadItem, known: dict) -> None:
        """`known`: by length of a piece, what stands before the bytes of the last such piece, and what that means."""
        stored = self.storage_data[item.storage_index]
        before, described = known.get(stored.length, (b"", None))
        file.seek(stored.offset)
        if described is None or file.read(len(before)) != before:
            described, start = describe(self._slice_file(file, stored))
            file.seek(stored.offset)
            before = file.read(start)
            known[stored.length] = before, described
        if target.is_cpu and target.numel() and _alike(described, target):
            rest = bytes_of(target)
            while count := file.readinto(rest):  # type: ignore[attr-defined]
                rest = rest[count:]
            if rest:
                raise EOFError(f"{stored.relative_path} is cut short")
            return
        piece = torch.load(self._slice_file(file, stored), map_location="cpu", weights_only=True)
        target.copy_(narrow_tensor_by_index(piece, item.storage_offsets, item.lengths))


def _alike(described: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the bytes of both are in the same order, with nothing between."""
    same = (described.dtype, described.size()) == (target.dtype, target.size())
    return same and described.is_contiguous() and target.is_contiguous() and described.storage_offset() == 0
