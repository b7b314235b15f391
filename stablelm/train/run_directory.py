"""What must hold of a directory before a run writes to it: it is the user's own, and leads nowhere else."""

import os
import stat
from pathlib import Path

from stablelm.checkpoint.fence import FENCE
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.checkpoint.selection import CHECKPOINTS, is_link
from stablelm.config.schema import Config
from stablelm.errors import ConfigError

FOLDERS = (
    CHECKPOINTS,
    "tensorboard",
    "heartbeat",
    "stacks",
    "profile",
    "probe",
    "slurm",
    "evaluations",
    "attempts",
    "data_seen",
)
APPENDED = "metrics.jsonl"


def check(config: Config) -> None:
    """ConfigError where run.dir is no directory, another user's, or holds links where the run would write."""
    fence = checkpoint_path(str(config.checkpoint.dir)) / FENCE
    if is_link(fence):
        raise ConfigError(_through_a_link(fence))
    run_dir = Path(config.run.dir)
    try:
        found = run_dir.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir} cannot be looked at ({error.strerror}); name another directory") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"run.dir={run_dir} is a file; name a directory")
    if found.st_uid != os.geteuid() and not config.run.allow_foreign_dir:
        raise ConfigError(
            f"run.dir={run_dir} belongs to another user (uid {found.st_uid}), who can replace what a run finds and "
            "writes there; name another directory, or set run.allow_foreign_dir=true"
        )
    for name in FOLDERS:
        if (run_dir / name).is_symlink() and not _is_given(config, run_dir / name):
            raise ConfigError(_through_a_link(run_dir / name))
    records = run_dir / APPENDED
    if os.path.lexists(records) and not stat.S_ISREG(records.lstat().st_mode):
        raise ConfigError(f"{records} is not a regular file; remove it, or name another run.dir")


def _is_given(config: Config, folder: Path) -> bool:
    """Whether the user named this folder, under that name, as the place of the checkpoints."""
    return config.checkpoint.dir is not None and folder.name == CHECKPOINTS and Path(config.checkpoint.dir) != folder


def _through_a_link(folder: CheckpointPath) -> str:
    fix = "remove the link, or name another run.dir"
    if folder.name == CHECKPOINTS:
        fix = f"set checkpoint.dir={os.path.realpath(str(folder))} if that folder is yours, or remove the link"
    return (
        f"{folder} is a link to {os.readlink(str(folder))!r}, and a run does not write through links in run.dir; {fix}"
    )
