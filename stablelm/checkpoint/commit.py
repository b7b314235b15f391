"""Saving a step so that it is either there, whole and hashed, or not there at all.

All ranks write their tensors into a staging directory, rank 0 adds the state, the configuration, the manifest and
COMMITTED, and a rename onto a name that must not exist yet is the commit: COMMITTED goes in before the rename, so that
no directory with a step's name is ever incomplete. A failure on one rank is a failure on all, and leaves nothing but
the older commits.
"""

import json
import logging
import shutil
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stablelm.checkpoint.agree import Together
from stablelm.checkpoint.files import (
    FileRecord,
    free_bytes,
    gibibytes,
    record_of,
    rename_to_new,
    sync_directory,
    write_durably,
    writing,
)
from stablelm.checkpoint.manifest import (
    COMMITTED,
    CONFIG,
    MANIFEST,
    STATE,
    TENSORS,
    Commit,
    commit_content,
    manifest_content,
    read_commit,
    read_manifest,
    step_name,
    verify,
)
from stablelm.checkpoint.portable import save_tensors, tensor_bytes
from stablelm.errors import CheckpointError, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveResult:
    """Where a step was saved, how long this rank took (seconds), and the bytes of all files together."""

    path: Path
    seconds: float
    bytes: int


def save(
    root: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    config_yaml: str,
    *,
    attempt: str,
    group: dist.ProcessGroup | None,
    rank: int,
    world_size: int,
) -> SaveResult:
    """Commits `root/step-<8 digits>`; collective over `group` (gloo, rank is the one inside it; None: one process).

    Tensors are plain (equal on all ranks) or DTensors; `state` (JSON values) and `config_yaml` count on rank 0. A step
    that is committed already and verifies is left as it is; a damaged one is set aside under `damaged-...`. Raises on
    all ranks alike, with the staging directory removed: StorageError if the storage is full or unwritable,
    CheckpointError if another writer committed the step meanwhile.
    """
    started = time.perf_counter()
    together = _together(group, rank, world_size)
    root = Path(root)
    target = root / step_name(step)
    standing, size = together.first(lambda: _standing(target))
    if standing == "whole":
        return SaveResult(target, time.perf_counter() - started, size)
    staging, records = _stage(root, step, tensors, state, config_yaml, together)
    commit = Commit(step, attempt, datetime.now(UTC).isoformat(), record_of(manifest_content(records)).sha256)
    together.first(lambda: _publish(staging, target, commit, replace=standing == "damaged"))
    return SaveResult(target, time.perf_counter() - started, _total(records))


def rehearse(
    root: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    config_yaml: str,
    *,
    group: dist.ProcessGroup | None,
    rank: int,
    world_size: int,
) -> SaveResult:
    """Does all of a save but the commit, then removes what it wrote: shows early that saving works, and its time.

    Collective and failing like `save`; the result's path is `root`.
    """
    started = time.perf_counter()
    together = _together(group, rank, world_size)
    root = Path(root)
    staging, records = _stage(root, step, tensors, state, config_yaml, together)
    together.first(lambda: shutil.rmtree(staging))
    return SaveResult(root, time.perf_counter() - started, _total(records))


def _together(group: dist.ProcessGroup | None, rank: int, world_size: int) -> Together:
    expected = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    assert (rank, world_size) == expected, f"rank {rank} of {world_size} saves through a group of {expected}"
    return Together(group, rank)


def _standing(target: Path) -> tuple[str, int]:
    """Whether the step is `absent`, `whole` or `damaged`, and the bytes of a whole one."""
    if not target.exists():
        return "absent", 0
    problems = verify(target)
    if problems:
        logger.warning("%s is damaged (%s): it will be set aside and saved anew", target, problems[0])
        return "damaged", 0
    return "whole", _total(read_manifest(target, read_commit(target)))


def _stage(
    root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, config_yaml: str, together: Together
) -> tuple[Path, dict[str, FileRecord]]:
    """Writes all but COMMITTED; returns the staging directory and the records of its manifest."""
    staging = together.first(lambda: _prepare(root, step, tensors))
    together.undo = lambda: shutil.rmtree(staging, ignore_errors=True)

    def write_tensors() -> dict[str, FileRecord]:
        with writing(root):
            return save_tensors(staging / TENSORS, tensors, together.group)

    written = together.run(write_tensors)
    records = {f"{TENSORS}/{name}": record for of_rank in written for name, record in of_rank.items()}
    return staging, together.first(lambda: _seal(staging, records, state, config_yaml))


def _prepare(root: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        sync_directory(root.parent)
        # 5 % and a page a tensor cover torch's headers and alignment.
        needed = int(tensor_bytes(tensors) * 1.05) + 4096 * len(tensors)
        free = free_bytes(root)
        if free < needed:
            raise StorageError(
                f"{root} has {gibibytes(free)} free, but a checkpoint needs {gibibytes(needed)}: free space there, "
                "lower checkpoint.keep or set checkpoint.dir to another disk; committed checkpoints are kept"
            )
        staging = root / f".staging-{step:08d}-{uuid.uuid4().hex}"
        staging.mkdir()
        return staging


def _seal(staging: Path, records: dict[str, FileRecord], state: dict, config_yaml: str) -> dict[str, FileRecord]:
    with writing(staging.parent):
        for name, record in records.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != record.size:
                raise StorageError(
                    f"rank 0 does not see the file {name} that another rank wrote to {staging.parent}: "
                    "set checkpoint.dir to a directory that all nodes share"
                )
        state_json = json.dumps(state, sort_keys=True, indent=1) + "\n"
        records = {
            **records,
            STATE: write_durably(staging / STATE, state_json.encode()),
            CONFIG: write_durably(staging / CONFIG, config_yaml.encode()),
        }
        write_durably(staging / MANIFEST, manifest_content(records))
        return records


def _publish(staging: Path, target: Path, commit: Commit, *, replace: bool) -> None:
    with writing(target.parent):
        write_durably(staging / COMMITTED, commit_content(commit))
        sync_directory(staging)
        if replace:
            target.rename(target.with_name(f"damaged-{target.name}-{uuid.uuid4().hex}"))
        try:
            rename_to_new(staging, target)
        except FileExistsError as error:
            raise CheckpointError(
                f"another attempt committed {target} while this one was saving it: end one of the two"
            ) from error
        sync_directory(target.parent)


def _total(records: dict[str, FileRecord]) -> int:
    return sum(record.size for record in records.values())
