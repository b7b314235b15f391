"""Which checkpoints to keep, and the deletion of the others."""

import logging
import shutil
import uuid
from functools import cache

from stablelm.checkpoint.best import best_step, evaluations_of
from stablelm.checkpoint.manifest import COMMITTED, step_of, verify
from stablelm.checkpoint.remote_path import CheckpointPath, RemotePath, writing
from stablelm.checkpoint.selection import is_link, step_directories
from stablelm.new_files import sync_directory

logger = logging.getLogger(__name__)


def retain(
    root: CheckpointPath,
    keep: int,
    keep_permanent_every: int | None,
    *,
    best: str | None = None,
    hashes: bool = False,
) -> list[CheckpointPath]:
    """Deletes superseded checkpoints and returns them; see `superseded`. Raises StorageError."""
    with writing(root):
        found = superseded(root, keep, keep_permanent_every, best=best, hashes=hashes)
        return [path for path in found if _delete(path)]


def _delete(path: CheckpointPath) -> bool:
    """False, with nothing deleted, where a link has replaced the checkpoint meanwhile."""
    # What makes it a checkpoint is removed first and at once: an interrupted deletion leaves nothing that looks valid.
    if isinstance(path, RemotePath):
        (path / COMMITTED).remove()
        path.remove()
        return True
    doomed = path.with_name(f".deleting-{path.name}-{uuid.uuid4().hex}")
    path.rename(doomed)
    if doomed.is_symlink():
        doomed.rename(path)
        return False
    sync_directory(path.parent)
    shutil.rmtree(doomed)
    return True


def superseded(
    root: CheckpointPath,
    keep: int,
    keep_permanent_every: int | None,
    *,
    best: str | None = None,
    hashes: bool = False,
) -> list[CheckpointPath]:
    """Valid checkpoints beyond the newest `keep` (at least 1) valid ones, but for multiples of keep_permanent_every.

    The one that is best by the metric `best` is not among them either. Damaged ones neither count nor are listed.
    Links, such as to an archive, count but are not listed; a warning says so once. Without `hashes` valid
    means: committed, and all names and sizes agree.
    """
    assert keep >= 1
    valid = [path for path in step_directories(root) if not verify(path, hashes=hashes)]
    found = [path for path in valid[keep:] if not is_permanent(path, keep_permanent_every)]
    if best is not None and found:
        # Each knows the best one before it, so that the permanent ones, which may be many, are not read.
        known = evaluations_of([*valid[:keep], *found])
        steps = {step_of(path) for path in valid}
        kept = best_step({step: metrics for step, metrics in known.items() if step in steps}, best)
        found = [path for path in found if step_of(path) != kept]
    return [path for path in found if not (is_link(path) and _warned_of_link(path))]


@cache
def _warned_of_link(path: CheckpointPath) -> bool:
    logger.warning("%s is a link and is left alone: delete it by hand if it is not needed", path)
    return True


def is_permanent(path: CheckpointPath, keep_permanent_every: int | None) -> bool:
    step = step_of(path)
    return bool(keep_permanent_every) and step is not None and step % keep_permanent_every == 0
