"""A run's attempts: their numbers, `run.dir/attempts/<8 digits>.json`, and the summary of the last one.

Each file is created by one start alone. A start first looks up the next number, and takes it once its data is checked
and its ranks have met. If another start has taken the number meanwhile, both began at the same moment, and the later
one ends. A start that begins afterwards finds the next number and takes over by the fencing token, whatever became of
the one before: the record of a dead process blocks nobody. Neither does that of an earlier attempt of the same Slurm
job, which a node failure may have stalled, nor that of a process of this host that has ended.
"""

import errno
import json
import os
import re
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.errors import EXIT_FINISHED, EXIT_STOPPED_EARLY, ConfigError
from stablelm.json_text import Count, Number, as_number, parse
from stablelm.new_files import make_folder, replace_file, write_durably
from stablelm.small_files import read_small

FOLDER = "attempts"
_NAME = re.compile(r"([0-9]{8,18})\.json")


class Holder(TypedDict):
    """Who took a number; `time` is UTC in ISO 8601."""

    host: Annotated[str, Field(max_length=300)]
    pid: Count
    time: Annotated[str, Field(max_length=60)]
    slurm_job: str | None


def newest(run_dir: Path) -> int:
    """The largest number that was taken, 0 before the first."""
    try:
        found = [_NAME.fullmatch(name) for name in os.listdir(run_dir / FOLDER)]
    except OSError:
        return 0
    return max((int(match[1]) for match in found if match), default=0)


def holder(run_dir: Path, number: int) -> Holder | None:
    """Who took a number, None where that cannot be read."""
    try:
        return parse(read_small(_path(run_dir, number)), Holder)
    except (OSError, ValueError):
        return None


def take(run_dir: Path, number: int) -> int:
    """Takes `number`, or the next free one if its holder cannot be running any more; `run_dir` exists.

    Raises ConfigError if another start holds it, with nothing changed, and OSError where nothing can be written.
    """
    make_folder(run_dir / FOLDER)
    while not _create(_path(run_dir, number)):
        found = holder(run_dir, number)
        if found is None or not _superseded(found):
            who = f"process {found['pid']} on {found['host']} since {found['time'][:19]} UTC" if found else "another"
            raise ConfigError(
                f"run.dir={run_dir} is held by another start that began at the same moment (attempt {number}: {who}); "
                "let it continue, or give this one another run.dir"
            )
        number += 1
    return number


def _superseded(found: Holder) -> bool:
    """Whether a holder has ended, or is an earlier attempt of the same Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and found["slurm_job"] == job:
        return True
    return found["host"] == socket.gethostname() and not _runs(found["pid"])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _create(path: Path) -> bool:
    """Whether this call created the file; its content appears at once where the file system has links."""
    taker: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(UTC).isoformat(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_durably(draft, (json.dumps(taker) + "\n").encode())
        try:
            os.link(draft, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            with path.open("x") as file:
                file.write(draft.read_text())
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / FOLDER / f"{number:08d}.json"


class Summary(TypedDict, total=False):
    """The fields of a summary that are read back; others may be anything."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    exit_code: int | None
    reason: str
    attempts: Count
    step: Count
    tokens: Count
    loss: Number | str | None
    val_loss: dict[str, Number | str] | None
    tokens_per_second: Number | str | None
    params: Count


def write_summary(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Replaces the file in one step, unless it is a later attempt's, or already says how this one ended.

    When one rank fails, its peers fail because of it: the first cause is the true one. Nor does an attempt report a
    failure once a later one has begun, which may have caused it.
    """
    path, attempt = Path(run_dir) / "summary.json", summary.get("attempts", 0)
    earlier = read_summary(run_dir)
    last = earlier.get("attempts", 0)
    if last > attempt or (last == attempt and earlier.get("exit_code") is not None):
        return
    succeeded = summary.get("exit_code") in (EXIT_FINISHED, EXIT_STOPPED_EARLY)
    if newest(Path(run_dir)) > attempt and not succeeded:
        return
    replace_file(path, json.dumps(as_number(summary), indent=2, allow_nan=False) + "\n")


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The last attempt's summary; empty where there is none, or it is not one that we wrote."""
    try:
        return dict(parse(read_small(Path(run_dir) / "summary.json"), Summary))
    except (OSError, ValueError):
        return {}
