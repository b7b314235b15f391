"""Tensors to and from disk in torch.distributed.checkpoint's format, without ever executing what is read.

Every engine saves under the same clean names (`model.<name>`, `optim.<name>.exp_avg`, ...), so that any engine and
world size can load what another one saved. torch's own reader unpickles `.metadata` with no restraint; ours lets only
the handful of classes through that describe tensors. The pieces themselves are read by torch with weights_only=True.
"""

import io
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stablelm.checkpoint.agree import Together
from stablelm.checkpoint.files import FileRecord, sync_directory
from stablelm.errors import CheckpointError

_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|module)\.")
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


def clean_name(name: str) -> str:
    """The parameter's name without what compile, recompute and data-parallel wrappers put into it."""
    return _WRAPPER.sub("", name)


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the whole (unsharded) tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def save_tensors(
    directory: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    """Writes plain tensors (equal on all ranks) and DTensors of any shape, dtype and device into a new directory.

    Collective over `group` (gloo; None: one process). Returns the records of the files that this rank wrote, by
    name; they are on the disk. Raises OSError; what another rank failed with may arrive as another exception, so
    call it inside a phase of `Together`.
    """
    for name, tensor in tensors.items():
        assert isinstance(tensor, torch.Tensor), f"{name} is no tensor: other values belong into the state"
        assert name == clean_name(name), f"{name} carries a wrapper's prefix"
    writer = _Writer(directory)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _single_process_is_meant():
            save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        # torch.save hides the OSError of its stream behind a RuntimeError of its own.
        raise writer.files.failure or _first_failure(error) from error
    sync_directory(directory)
    return writer.files.records


def load_tensors(
    directory: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None, *, partial: bool = False
) -> None:
    """Fills `tensors` (plain or DTensor, any device) in place from a directory that save_tensors wrote.

    Collective over `group` (None: one process); its world size and sharding may differ from the writer's. Names,
    shapes and dtypes must agree with the checkpoint, which may hold more names only if `partial`. Raises
    CheckpointError on all ranks, before any tensor is touched unless a file proves damaged while it is read.
    """
    together = Together(group, 0 if group is None else dist.get_rank(group))
    # All ranks read the metadata and compare first: one that fails alone would leave the others waiting.
    description = None

    def compare() -> None:
        nonlocal description
        description = read_metadata(directory)
        _compare(directory, tensors, description, partial)

    together.run(compare)
    assert description is not None
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _Reader(directory, description)
    try:
        with _single_process_is_meant():
            load(dict(tensors), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        reason = str(_first_failure(error)).splitlines() or ["unreadable"]
        raise CheckpointError(
            f"the tensors in {directory} are damaged ({reason[0][:200]}): load another checkpoint"
        ) from error


def read_metadata(directory: Path) -> metadata.Metadata:
    """Which tensors a directory holds, and where. Raises CheckpointError; executes nothing."""
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            description = _Unpickler(file).load()
        _check(description)
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


def _compare(directory: Path, tensors: dict[str, torch.Tensor], description: metadata.Metadata, partial: bool) -> None:
    held = cast(dict[str, metadata.TensorStorageMetadata], description.state_dict_metadata)
    missing = sorted(tensors.keys() - held.keys())
    unexpected = [] if partial else sorted(held.keys() - tensors.keys())
    different = [
        f"{name} ({_described(held[name].size, held[name].properties.dtype)} in the checkpoint, "
        f"{_described(tensor.shape, tensor.dtype)} here)"
        for name, tensor in sorted(tensors.items())
        if name in held and (held[name].size, held[name].properties.dtype) != (tensor.shape, tensor.dtype)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "different": different}
    problems = [f"{kind}: {_few(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"the tensors in {directory} do not fit this model ({'; '.join(problems)}): "
            "use the configuration that the checkpoint was trained with"
        )


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape)) or 'scalar'} {str(dtype).removeprefix('torch.')}"


def _few(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _first_failure(error: CheckpointException) -> Exception:
    failures = [failure for failure, _ in error.failures.values()]
    # An OSError says most: the other ranks may only report that someone failed.
    chosen = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
    return chosen if isinstance(chosen, Exception) else RuntimeError(str(chosen))


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _HashingStream(io.RawIOBase):
    """Passes writes on, hashes them on the way, and keeps the OSError that torch.save would swallow."""

    def __init__(self, raw: IO[bytes], files: "_HashingFiles"):
        self.raw, self.files = raw, files
        self.digest, self.size = sha256(), 0

    def write(self, content: Any) -> int:
        try:
            self.raw.write(content)
        except OSError as error:
            self.files.failure = error
            raise
        self.digest.update(content)
        self.size += memoryview(content).nbytes
        return memoryview(content).nbytes

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.raw.flush()  # what is asked for is an fsync, which must find everything in the file
        return self.raw.fileno()


class _HashingFiles(filesystem.FileSystem):
    """torch's local files, which also records what was written."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with open(path, mode) as raw:
            stream = _HashingStream(raw, self)
            yield stream
            raw.flush()
        self.records[Path(path).name] = FileRecord(stream.size, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Writer(filesystem.FileSystemWriter):
    def __init__(self, directory: Path):
        super().__init__(directory, sync_files=True, overwrite=False)
        self.files = self.fs = _HashingFiles()

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # no path and no random name: equal tensors give equal files


class _Reader(filesystem.FileSystemReader):
    """torch's reader over metadata that was read and checked before."""

    def __init__(self, directory: Path, description: metadata.Metadata):
        super().__init__(directory)
        self.description = description

    # Without **kwargs, or torch would go on to unpickle other files when this one fails.
    def read_metadata(self) -> metadata.Metadata:
        return self.description
