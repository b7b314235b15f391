"""Which checkpoint to load, which ones to keep, and what dead attempts left behind. Knows files only, no ranks."""

import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stablelm.checkpoint.files import sync_directory, writing
from stablelm.checkpoint.manifest import CONFIG, STATE, step_of, verify
from stablelm.errors import CheckpointError

__all__ = [
    "checkpoints_root",
    "clean_staging",
    "newest_valid",
    "read_state",
    "resolve_checkpoint",
    "retain",
    "step_directories",
    "superseded",
    "verify",
]

logger = logging.getLogger(__name__)


def step_directories(root: Path) -> list[Path]:
    """All directories with a step's name, the newest step first, valid or not."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(root: Path, *, on_damaged: Callable[[Path, str], None]) -> Path | None:
    """The newest step directory of which every byte verifies; None if there is none.

    Damaged ones that are newer go to `on_damaged` with the reason; they are never deleted.
    """
    for path in step_directories(Path(root)):
        problems = verify(path)
        if not problems:
            return path
        on_damaged(path, _summary(problems))
    return None


def retain(root: Path, keep: int, keep_permanent_every: int | None, *, hashes: bool = False) -> list[Path]:
    """Deletes superseded checkpoints and returns them; see `superseded`. Raises StorageError."""
    root = Path(root)
    gone = superseded(root, keep, keep_permanent_every, hashes=hashes)
    with writing(root):
        for path in gone:
            _delete(path)
    return gone


def _delete(path: Path) -> None:
    # The rename takes the step's name away at once: a deletion that is cut short leaves nothing that looks valid.
    doomed = path.with_name(f".deleting-{path.name}-{uuid.uuid4().hex}")
    path.rename(doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed)


def superseded(root: Path, keep: int, keep_permanent_every: int | None, *, hashes: bool = False) -> list[Path]:
    """Valid checkpoints beyond the newest `keep` (at least 1) valid ones, but for multiples of keep_permanent_every.

    Damaged ones neither count nor are listed. Without `hashes` valid means: committed, and all names and sizes agree.
    """
    assert keep >= 1
    valid = [path for path in step_directories(root) if not verify(path, hashes=hashes)]
    return [path for path in valid[keep:] if not is_permanent(path, keep_permanent_every)]


def is_permanent(path: Path, keep_permanent_every: int | None) -> bool:
    step = step_of(path)
    return bool(keep_permanent_every) and step is not None and step % keep_permanent_every == 0


def clean_staging(root: Path) -> list[Path]:
    """Removes what dead attempts left half written or half deleted, and returns it. Call it before saving starts."""
    root = Path(root)
    if not root.is_dir():
        return []
    left = sorted(path for path in root.iterdir() if path.name.startswith((".staging-", ".deleting-")))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def checkpoints_root(path: Path) -> Path:
    """The directory of the step directories for a run directory, or `path` itself if it holds them.

    Raises CheckpointError if the path does not exist.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory: name a run, its checkpoints or one step-... directory in it")
    if step_directories(path):
        return path
    configured = _configured_root(path)
    return next((place for place in (path / "checkpoints", configured) if place and place.is_dir()), path)


def resolve_checkpoint(path: Path, *, on_damaged: Callable[[Path, str], None] | None = None) -> Path:
    """The step directory meant by a run directory, its checkpoints directory or a step directory, fully verified.

    Raises CheckpointError if there is none, or if the step directory that was named is damaged.
    """
    path = Path(path)
    if step_of(path) is not None and path.is_dir():
        problems = verify(path)
        if problems:
            raise CheckpointError(f"{path} is damaged ({_summary(problems)}): name another checkpoint")
        return path
    root = checkpoints_root(path)
    found = newest_valid(root, on_damaged=on_damaged or _warn)
    if found is None:
        kind = "only damaged checkpoints" if step_directories(root) else "no checkpoint"
        raise CheckpointError(f"{root} holds {kind}: name the directory of a run that has saved one")
    return found


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a step directory. Raises CheckpointError."""
    try:
        return json.loads((Path(path) / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {Path(path) / STATE} ({error}): load another checkpoint") from error


def _configured_root(run_dir: Path) -> Path | None:
    """checkpoint.dir of a run's resolved configuration, if it says one."""
    import yaml

    try:
        config = yaml.safe_load((run_dir / CONFIG).read_text())
        return Path(config["checkpoint"]["dir"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _summary(problems: list[str], shown: int = 3) -> str:
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more


def _warn(path: Path, reason: str) -> None:
    logger.warning("%s is damaged (%s): skipped", path, reason)
