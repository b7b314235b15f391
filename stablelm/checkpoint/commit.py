"""Saving a step so that it either exists, complete and hashed, or does not exist at all.

Rank 0 makes a staging place with the state and the configuration, all ranks write their tensors into it, rank 0 adds
the manifest, and one last operation is the commit: in a folder, the rename of the staging directory, COMMITTED already
in it, onto a step's name that must be free; in an object store, the creation of COMMITTED on the condition that it
does not exist. A failure on one rank is a failure on all, and leaves nothing but the older commits. `fence` says why
only one attempt can commit.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stablelm.checkpoint.contents import gaps
from stablelm.checkpoint.fence import DELETING, STAGING, Fence, writing_behind
from stablelm.checkpoint.format import Read, sample, save_tensors, tensor_bytes
from stablelm.checkpoint.manifest import (
    COMMITTED,
    CONFIG,
    MANIFEST,
    STATE,
    TENSORS,
    Commit,
    FileRecord,
    commit_content,
    manifest_content,
    read_commit,
    read_manifest,
    record_of,
    step_name,
    step_of,
    verify,
    write_new,
)
from stablelm.checkpoint.remote_path import MAKE_SPACE, CheckpointPath, RemotePath
from stablelm.checkpoint.selection import step_directories
from stablelm.checkpoint.tensor_index import read_index
from stablelm.engine.consensus import Consensus
from stablelm.errors import CheckpointError, StorageError
from stablelm.new_files import free_bytes, rename_to_new, sync_directory, write_durably
from stablelm.printable import few, printable

logger = logging.getLogger(__name__)
SAMPLE_BYTES = 64 << 20
"""What a dry run writes, a rank."""


@dataclass(frozen=True)
class SaveResult:
    """Where a step was saved, how long this rank took (seconds), and the total bytes of its files."""

    path: CheckpointPath
    seconds: float
    bytes: int


def save(
    fence: Fence,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    config_yaml: str,
    *,
    shapes: Mapping[str, torch.Size],
    group: dist.ProcessGroup | None,
    reached: Callable[[str], None] = lambda part: None,
    read: Read | None = None,
) -> SaveResult:
    """Commits a step below `fence.root`; collective over `group` (gloo; None: one process).

    Tensors are plain (equal on all ranks), DTensors or FlatShards, or empty ones to `read` (see `save_tensors`);
    `state` (JSON values) and `config_yaml` count on rank 0. `shapes` is what must be there for the step to be
    committed: the whole shape of each tensor by name. A step that is committed already and verifies is left as it is; a
    damaged or incomplete one is set aside under `damaged-...`. Raises on all ranks alike, with what was staged removed:
    StorageError if the storage is full, unwritable or unreachable, CheckpointError if a newer attempt of the run has
    taken over, RuntimeError if a tensor of `shapes` is missing or incomplete.
    """
    started = time.perf_counter()
    consensus = Consensus(group, 0 if group is None else dist.get_rank(group), reached)
    earlier = consensus.first(lambda: _find_earlier(fence, step, shapes), "look for an earlier save")
    if earlier.path is not None:
        return SaveResult(earlier.path, time.perf_counter() - started, earlier.bytes)
    staging, records, _ = _stage(fence, step, tensors, state, config_yaml, consensus, whole=tensors, read=read)
    consensus.first(lambda: _refuse_incomplete(fence, staging, step, shapes), "check of its tensors")
    path = consensus.first(lambda: _publish(fence, staging, step, records, earlier), "commit")
    return SaveResult(path, time.perf_counter() - started, _total(records))


def dry_run(
    fence: Fence,
    tensors: dict[str, torch.Tensor],
    *,
    group: dist.ProcessGroup | None,
    reached: Callable[[str], None] = lambda part: None,
) -> SaveResult:
    """Shows early that saving works, and about its time: checks for the space that a checkpoint of `tensors` needs,
    writes and removes as much as SAMPLE_BYTES of what each rank would write.

    Collective and failing like `save`. The result's path is `fence.root`; its bytes and seconds are those of a whole
    save, the seconds extrapolated from the sample by its bytes.
    """
    started = time.perf_counter()
    consensus = Consensus(group, 0 if group is None else dist.get_rank(group), reached)
    taken, times = sample(tensors, SAMPLE_BYTES, group)
    staging, _, writing = _stage(fence, 0, taken, {}, "", consensus, whole=tensors)
    slowest = max(consensus.run(lambda: writing * (times - 1), "estimate"))
    consensus.first(lambda: _discard(staging), "removal")
    return SaveResult(fence.root, time.perf_counter() - started + slowest, tensor_bytes(tensors))


@dataclass(frozen=True)
class _Earlier:
    """An earlier save of the step: an intact checkpoint and its bytes, or the inode of a damaged local one."""

    path: CheckpointPath | None = None
    bytes: int = 0
    damaged: int | None = None


def _find_earlier(fence: Fence, step: int, shapes: Mapping[str, torch.Size]) -> _Earlier:
    fence.check()
    for path in step_directories(fence.root):
        if step_of(path) != step:
            continue
        inode = path.stat().st_ino if isinstance(path, Path) else None
        problems = verify(path) or _lacks(path, shapes)
        if not problems:
            return _Earlier(path, _total(read_manifest(path, read_commit(path))))
        logger.warning("%s", printable(f"{path} is damaged ({problems[0]}): the step will be saved again"))
        if inode is not None:
            return _Earlier(damaged=inode)
    return _Earlier()


def _lacks(path: CheckpointPath, shapes: Mapping[str, torch.Size]) -> list[str]:
    try:
        return gaps(read_index(path / TENSORS), shapes)
    except CheckpointError as error:
        return [str(error)]


def _stage(
    fence: Fence,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict,
    config_yaml: str,
    consensus: Consensus,
    *,
    whole: dict[str, torch.Tensor],
    read: Read | None = None,
) -> tuple[CheckpointPath, dict[str, FileRecord], float]:
    """Writes all but COMMITTED, where a checkpoint of `whole` has space.

    Returns the staging place, the records of its manifest and the seconds that writing tensors took.
    """
    made: list[CheckpointPath] = []
    consensus.undo = lambda: [_discard(place) for place in made]  # type: ignore[assignment]

    def prepare() -> tuple[CheckpointPath, dict[str, FileRecord]]:
        with writing_behind(fence):
            made.append(_make_staging(fence, step, whole))
            state_json = json.dumps(state, sort_keys=True, indent=1) + "\n"
            texts = {STATE: state_json.encode(), CONFIG: config_yaml.encode()}
            return made[0], {name: write_new(made[0] / name, content) for name, content in texts.items()}

    staging, texts = consensus.first(prepare, "staging")

    def sees_it() -> None:
        if isinstance(staging, Path) and not staging.is_dir():
            fence.check()
            raise StorageError(
                f"rank {consensus.rank} does not see the directory that rank 0 made in {fence.root}: "
                "set checkpoint.dir to a directory that all nodes share"
            )

    def write_tensors() -> dict[str, FileRecord]:
        with writing_behind(fence):
            return save_tensors(staging / TENSORS, tensors, consensus.group, consensus.reached, read)

    consensus.run(sees_it, "look at the staging directory")
    started = time.perf_counter()
    written = consensus.run(write_tensors, "tensors")
    seconds = time.perf_counter() - started
    records = {f"{TENSORS}/{name}": record for of_rank in written for name, record in of_rank.items()}
    return staging, consensus.first(lambda: _seal(fence, staging, {**records, **texts}), "manifest"), seconds


def _make_staging(fence: Fence, step: int, tensors: dict[str, torch.Tensor]) -> CheckpointPath:
    root, token = fence.root, f"{fence.token:08d}"
    if isinstance(root, RemotePath):
        return root / step_name(step) / f"{token}-{uuid.uuid4().hex}"
    # A run directory that was removed stays removed.
    root.mkdir(parents=not fence.taken, exist_ok=True)
    sync_directory(root.parent)
    # 5 % and a page a tensor cover headers, the index and whole blocks.
    needed = int(tensor_bytes(tensors) * 1.05) + 4096 * len(tensors)
    free = free_bytes(root)
    if free < needed:
        raise StorageError(
            f"{root} has {_gibibytes(free)} free, but a checkpoint needs {_gibibytes(needed)}", MAKE_SPACE
        )
    staging = root / f"{STAGING}{token}-{step:08d}-{uuid.uuid4().hex}"
    staging.mkdir()
    return staging


def _seal(fence: Fence, staging: CheckpointPath, records: dict[str, FileRecord]) -> dict[str, FileRecord]:
    with writing_behind(fence):
        for name, record in records.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != record.size:
                fence.check()
                raise StorageError(
                    f"rank 0 does not see the file {name} that another rank wrote to {fence.root}: "
                    "set checkpoint.dir to a directory that all nodes share"
                )
        write_new(staging / MANIFEST, manifest_content(records))
        return records


def _refuse_incomplete(fence: Fence, staging: CheckpointPath, step: int, shapes: Mapping[str, torch.Size]) -> None:
    try:
        missing = gaps(read_index(staging / TENSORS), shapes)
    except CheckpointError:
        fence.check()  # a newer attempt may have swept it away
        raise
    if missing:
        raise RuntimeError(
            f"step {step} is not committed, its save is incomplete: {few(missing)} missing or incomplete; "
            "this is a fault of the program, please report it"
        )


def _publish(
    fence: Fence, staging: CheckpointPath, step: int, records: dict[str, FileRecord], earlier: _Earlier
) -> CheckpointPath:
    sealed = record_of(manifest_content(records)).sha256
    content = commit_content(Commit(step, fence.attempt, fence.token, datetime.now(UTC).isoformat(), sealed))
    with writing_behind(fence):
        try:
            if isinstance(staging, RemotePath):
                fence.check()
                (staging / COMMITTED).create(content)  # the commit
                return staging
            target = staging.with_name(step_name(step))
            write_durably(staging / COMMITTED, content)
            sync_directory(staging)
            fence.check()
            if earlier.damaged is not None:
                _set_aside(target, earlier.damaged)
            rename_to_new(staging, target)  # the commit
            sync_directory(target.parent)
            return target
        except (FileExistsError, FileNotFoundError) as error:
            fence.check()
            raise CheckpointError(
                f"something else wrote to {fence.root} while step {step} was saved there: let one run alone save to it"
            ) from error


def _set_aside(target: Path, inode: int) -> None:
    """Renames a damaged step away, unless another attempt has replaced it since."""
    aside = target.with_name(f"damaged-{target.name}-{uuid.uuid4().hex}")
    target.rename(aside)
    if aside.stat().st_ino != inode:
        rename_to_new(aside, target)
        raise FileExistsError(f"{target} was saved again")


def _discard(staging: CheckpointPath) -> None:
    """Removes what was staged; a directory under another name first, which no later attempt has to disarm."""
    if isinstance(staging, RemotePath):
        staging.remove()
        return
    doomed = staging.with_name(f"{DELETING}{staging.name[1:]}")
    try:
        staging.rename(doomed)
    except OSError:
        doomed = staging
    shutil.rmtree(doomed, ignore_errors=True)


def _total(records: dict[str, FileRecord]) -> int:
    return sum(record.size for record in records.values())


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
