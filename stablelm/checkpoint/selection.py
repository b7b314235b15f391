"""Which checkpoint to load: the newest valid one of a run, or the one that was named."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from stablelm.checkpoint.best import BEST, metric_of, ranked
from stablelm.checkpoint.manifest import COMMITTED, CONFIG, attempt_of, step_of, verify
from stablelm.checkpoint.remote_path import CheckpointPath, RemotePath, checkpoint_path
from stablelm.engine.consensus import Consensus
from stablelm.errors import CheckpointError, ConfigError
from stablelm.printable import printable
from stablelm.small_files import read_small

CHECKPOINTS = "checkpoints"
"""Where a run has its checkpoints unless checkpoint.dir says otherwise."""
IMPORTED = "imported.json"
"""Beside the checkpoints of a run directory that holds an imported model: where it came from."""
logger = logging.getLogger(__name__)
Lacks = Callable[[CheckpointPath], list[str]]
"""What an undamaged checkpoint lacks, in phrases: `contents.problems`, where it is to hold a model."""


def step_directories(root: CheckpointPath) -> list[CheckpointPath]:
    """All directories of committed steps, the newest step first, valid or not."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    if isinstance(root, RemotePath):
        found = [prefix for step in found for prefix in step.iterdir() if _is_committed(prefix)]
    return sorted(found, key=lambda path: (step_of(path), attempt_of(path)), reverse=True)


def _is_committed(prefix: CheckpointPath) -> bool:
    try:
        return step_of(prefix) is not None and (prefix / COMMITTED).stat().st_size > 0
    except FileNotFoundError:
        return False


def newest_valid(
    root: CheckpointPath,
    *,
    on_damaged: Callable[[CheckpointPath, str], None],
    consensus: Consensus | None = None,
    lacks: Lacks | None = None,
) -> CheckpointPath | None:
    """The newest checkpoint of which every byte verifies and that `lacks` nothing; None if there is none.

    Damaged ones that are newer go to `on_damaged` (of rank 0) with the reason; they are never deleted. With `consensus`
    collective: each rank reads its share of the files.
    """
    consensus = consensus or Consensus(None, 0)
    for path in consensus.first(lambda: step_directories(root)):
        problems = verify_together(path, consensus, lacks)
        if not problems:
            return path
        if consensus.rank == 0:
            on_damaged(path, _summary(problems))
    return None


def verify_together(path: CheckpointPath, consensus: Consensus, lacks: Lacks | None = None) -> list[str]:
    """`verify` with the files divided among the ranks, then `lacks`; the same problems on all of them."""
    found = consensus.run(lambda: verify(path, share=(consensus.rank, consensus.size)))
    problems = list(dict.fromkeys(problem for of_rank in found for problem in of_rank))
    return problems or (consensus.first(lambda: lacks(path)) if lacks else [])


def checkpoints_root(path: CheckpointPath) -> CheckpointPath:
    """The directory of the step directories for a run directory, or `path` itself if it holds them.

    Nothing outside `path` is looked at: neither what a link in it leads to, nor the checkpoint.dir of its config.yaml,
    which anybody may have written. Raises CheckpointError if the path does not exist.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: name a run, its checkpoints or one step-... directory in it")
    inside = path / CHECKPOINTS
    return inside if not step_directories(path) and not is_link(inside) and inside.is_dir() else path


def is_link(path: CheckpointPath) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def no_checkpoint(root: CheckpointPath, path: CheckpointPath) -> CheckpointError:
    """There is none below `root`, where those of `path` were looked for; says where else they may lie."""
    asked = configured_root(path)
    if is_link(path / CHECKPOINTS):
        target = os.readlink(str(path / CHECKPOINTS))
        hint = f"its {CHECKPOINTS} is a link to {target!r}: name that folder if it is yours"
    elif asked is not None:
        hint = f"its {CONFIG} says checkpoint.dir={asked!r}: name that place if it is yours"
    else:
        hint = "name the directory of a run that has saved one"
    return CheckpointError(f"{root} holds no checkpoint; {hint}")


def resolve_checkpoint(
    path: CheckpointPath | str,
    *,
    consensus: Consensus | None = None,
    lacks: Lacks | None = None,
    elsewhere: CheckpointPath | None = None,
) -> CheckpointPath:
    """The checkpoint meant by a run directory, its checkpoints directory or a step directory, fully verified.

    RUN_DIR/best means its best one, by the metric evaluate.best of its newest one's configuration. `elsewhere` is where
    the user says that a run without any in its directory has them. With `consensus` collective: each rank reads its
    share of the files. Raises CheckpointError if there is none, or if the step directory that was named is damaged or
    `lacks` something.
    """
    path, consensus = checkpoint_path(path), consensus or Consensus(None, 0)
    step = consensus.first(lambda: step_directory(path))
    if step is not None:
        problems = verify_together(step, consensus, lacks)
        if problems:
            raise CheckpointError(f"{path} is damaged ({_summary(problems)}): name another checkpoint")
        return step
    best = consensus.first(lambda: is_best(path))
    run = path.parent if best else path
    root = consensus.first(lambda: checkpoints_root(run))
    if elsewhere is not None and not consensus.first(lambda: step_directories(root)):
        root = elsewhere
    if best and consensus.first(lambda: step_directories(root)):
        return _best_valid(root, on_damaged=_warn, consensus=consensus, lacks=lacks)
    found = newest_valid(root, on_damaged=_warn, consensus=consensus, lacks=lacks)
    if found is None and step_directories(root):
        raise CheckpointError(
            f"{root} holds only damaged checkpoints: name the directory of a run that has saved an intact one"
        )
    if found is None:
        raise no_checkpoint(root, run)
    return found


def is_best(path: CheckpointPath) -> bool:
    """Whether a path asks for the best checkpoint of the run, or of the directory of checkpoints, above it."""
    return path.name == BEST and not path.is_dir() and path.parent.is_dir()


def run_directory(path: CheckpointPath) -> CheckpointPath:
    """`path` without the word that asks for the best checkpoint."""
    return path.parent if is_best(path) else path


def _best_valid(
    root: CheckpointPath,
    *,
    on_damaged: Callable[[CheckpointPath, str], None],
    consensus: Consensus,
    lacks: Lacks | None,
) -> CheckpointPath:
    """The best checkpoint of which every byte verifies. Raises CheckpointError if there is none."""
    metric = consensus.first(lambda: next(filter(None, map(metric_of, step_directories(root))), None))
    if metric is None:
        raise CheckpointError(f"the run of {root} has no evaluate.best: name the run or a step-... directory of it")
    for path in consensus.first(lambda: ranked(step_directories(root), metric)):
        problems = verify_together(path, consensus, lacks)
        if not problems:
            return path
        if consensus.rank == 0:
            on_damaged(path, _summary(problems))
    raise CheckpointError(f"{root} has no intact checkpoint with {metric}: name the run or a step-... directory of it")


def step_directory(path: CheckpointPath) -> CheckpointPath | None:
    """The checkpoint that `path` itself is, or holds as a step of an object store; None for any other directory."""
    if step_of(path) is None or not path.is_dir():
        return None
    if isinstance(path, Path) or attempt_of(path):
        return path
    return next((step for step in step_directories(path.parent) if step.parent == path), None)


def configured_root(run_dir: CheckpointPath) -> str | None:
    """checkpoint.dir of a directory's config.yaml, if it asks for one: for the run's own user, or to be shown."""
    import yaml

    try:
        config = yaml.safe_load(read_small(run_dir / CONFIG))
        asked = config["checkpoint"]["dir"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError, yaml.YAMLError):
        return None
    return os.path.expanduser(asked) if isinstance(asked, str) and asked else None


def _summary(problems: list[str]) -> str:
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return "; ".join(problems[:3] + more)


def _warn(path: CheckpointPath, reason: str) -> None:
    logger.warning("%s", printable(f"{path} is damaged ({reason}): skipped"))
