"""The run directory: checked before a run writes to it, created once by rank 0, its failures known to all ranks."""

import json
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm.checkpoint.fence import FENCE
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.checkpoint.selection import CHECKPOINTS, is_link
from stablelm.config.identity import Identity
from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.data.storage.options import gather_seen
from stablelm.errors import ConfigError
from stablelm.json_text import parse
from stablelm.new_files import replace_file
from stablelm.observe import provenance
from stablelm.observe.sinks import storage_error
from stablelm.small_files import read_small
from stablelm.supervise import attempts

if TYPE_CHECKING:
    from stablelm.engine.ranks import Ranks

FOLDERS = (
    CHECKPOINTS,
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "heartbeat",
    "stacks",
    "profile",
    "probe",
    "slurm",
    "evaluations",
    "attempts",
    "data_seen",
    "compiled",
)
IDENTITY = "identity.json"
APPENDED = "metrics.jsonl"
RESOLVED = (
    "# What the keys of config.yaml became in the last attempt. To start the run again, pass config.yaml to --config.\n"
)


def check(config: Config) -> None:
    """ConfigError where run.dir is not a directory, is another user's, or holds links where the run would write."""
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


def read_identity(run_dir: Path) -> dict[str, Any]:
    """What the run was in its last attempt. Raises OSError or ValueError."""
    return dict(parse(read_small(run_dir / IDENTITY), Identity))


def write_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    """Keeps what the run is. Raises StorageError."""
    try:
        replace_file(run_dir / IDENTITY, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise storage_error(run_dir, error) from error


def create(
    config: Config,
    asked: Config,
    files: dict[str, list[str]],
    tokenizer: Mapping[str, bytes],
    ranks: "Ranks",
    argv: list[str],
    attempt: int,
    attention: str | None = None,
) -> int:
    """Writes config.yaml, resolved.yaml, the tokenizer and provenance; returns the attempt's number.

    `asked` is written as config.yaml, the resolved `config` beside it. Attempts are counted from 1; `attempt` is the
    number that was free when this one began (see `attempts.take`).
    `files` are the lists of remote files by asked path, which data_files.json keeps for the next attempt;
    `tokenizer`: content of its files by name; `attention`: the kernel, for the provenance.
    Raises StorageError on every rank if rank 0 cannot write, ConfigError if another start holds the run.
    """
    run_dir = Path(config.run.dir)

    hosts = list(dict.fromkeys(ranks.gather(socket.gethostname())))

    def write() -> int:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            number = attempts.take(run_dir, attempt)
            replace_file(run_dir / "config.yaml", dump(asked))
            replace_file(run_dir / "resolved.yaml", RESOLVED + dump(config))
            # Kept beside the checkpoints, so that a run that was moved can still be evaluated.
            for name, content in tokenizer.items():
                replace_file(run_dir / name, content)
            replace_file(run_dir / "data_files.json", json.dumps(files, indent=1) + "\n")
            gather_seen(run_dir)
            return provenance.write(run_dir, argv, ranks.world_size, hosts, attempt=number, attention=attention)
        except OSError as error:
            raise storage_error(run_dir, error) from error

    return ranks.consensus().first(write)
