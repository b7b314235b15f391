"""Tensors to and from storage in torch.distributed.checkpoint's format, without ever executing what is read.

Every engine saves under the same clean names (`model.<name>`, `optim.<name>.exp_avg`, ...), so that any engine and
world size can load what another one saved. torch's own reader unpickles `.metadata` with no restraint; ours lets only
the handful of classes through that describe tensors. The pieces themselves are read by torch with weights_only=True.
"""

import math
import re
import warnings
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stablelm.checkpoint.agree import Together
from stablelm.checkpoint.contents import few
from stablelm.checkpoint.files import FileRecord, sync_directory
from stablelm.checkpoint.places import Place, StoreError
from stablelm.checkpoint.tensor_files import Reader, Writer, read_metadata
from stablelm.errors import CheckpointError

__all__ = ["clean_name", "load_tensors", "read_metadata", "save_tensors", "tensor_bytes"]

_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|module)\.")
# One process is meant where no group is given. Set once: a save in the background must not change filters meanwhile.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def clean_name(name: str) -> str:
    """The parameter's name without what compile, recompute and data-parallel wrappers put into it."""
    return _WRAPPER.sub("", name)


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the whole (unsharded) tensors."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


def save_tensors(
    directory: Place, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    """Writes plain tensors (equal on all ranks), DTensors and FlatShards of any device into a new directory.

    Collective over `group` (gloo; None: one process). Returns the records of the files that this rank wrote, by
    name; they are on the disk. Raises OSError; what another rank failed with may arrive as another exception, so
    call it inside a phase of `Together`.
    """
    for name, tensor in tensors.items():
        assert isinstance(tensor, torch.Tensor), f"{name} is no tensor: other values belong into the state"
        assert name == clean_name(name), f"{name} carries a wrapper's prefix"
    writer = Writer(directory)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise writer.files.failure or _first_failure(error) from error
    if isinstance(directory, Path):
        sync_directory(directory)
    return writer.files.records


def load_tensors(
    directory: Place, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None, *, partial: bool = False
) -> None:
    """Fills `tensors` (plain, DTensor or FlatShard, any device) in place from a directory that save_tensors wrote.

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
    reader = Reader(directory, description)
    try:
        load(dict(tensors), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure = _first_failure(error)
        if isinstance(failure, StoreError):
            raise failure from error
        reason = str(failure).splitlines() or ["unreadable"]
        raise CheckpointError(
            f"the tensors in {directory} are damaged ({reason[0][:200]}): load another checkpoint"
        ) from error


def _compare(directory: Place, tensors: dict[str, torch.Tensor], description: metadata.Metadata, partial: bool) -> None:
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
    problems = [f"{kind}: {few(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"the tensors in {directory} do not fit this model ({'; '.join(problems)}): "
            "use the configuration that the checkpoint was trained with"
        )


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape)) or 'scalar'} {str(dtype).removeprefix('torch.')}"


def _first_failure(error: CheckpointException) -> Exception:
    failures = [failure for failure, _ in error.failures.values()]
    # An OSError says most: the other ranks may only report that someone failed.
    chosen = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
    return chosen if isinstance(chosen, Exception) else RuntimeError(str(chosen))
