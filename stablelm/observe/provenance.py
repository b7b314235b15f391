"""Where a run's numbers come from: code, command, versions and hosts of each attempt."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from stablelm.engine.process import environment
from stablelm.json_text import Count, checked, parse
from stablelm.new_files import replace_file
from stablelm.redaction import redacted
from stablelm.small_files import read_small

PACKAGES = ("stablelm", "torch", "accelerate", "deepspeed", "datasets", "sentencepiece", "fsspec", "numpy")
REPOSITORY = Path(__file__).resolve().parents[2]
GIT_SECONDS = 20
COPIED = ".commit"
# Results of studies are committed under docs while others run: none of that is the program (slurm/lib.sh: the same).
PROGRAM = ("--", ".", ":(exclude)docs", ":(exclude)tests")


class Attempt(TypedDict):
    """What must be right in an entry; the rest is shown, not used."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    attempt: Count


def write(
    run_dir: str | Path,
    argv: list[str],
    world_size: int,
    hosts: list[str] | None = None,
    *,
    attempt: int = 0,
    attention: str | None = None,
) -> int:
    """Adds this attempt to `run_dir/provenance.json` and returns its number, from 1; 0: one more than the last.

    Uncommitted changes of the program go to `provenance-<attempt>.diff`. `hosts` default to this
    one; `attention`: the kernel that it uses. Works without git. Raises OSError where the directory cannot be written.
    """
    run_dir = Path(run_dir)
    attempts = read(run_dir)
    attempt = attempt or 1 + max((entry["attempt"] for entry in attempts), default=0)
    commit, diff = git_state(REPOSITORY)
    diff_file = f"provenance-{attempt}.diff" if diff else None
    if diff_file:
        replace_file(run_dir / diff_file, diff)
    attempts.append(
        {
            "attempt": attempt,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "diff": diff_file,
            "argv": [redacted(argument) for argument in argv],
            "world_size": world_size,
            "hosts": hosts or [socket.gethostname()],
            "python": platform.python_version(),
            "system": platform.platform(),
            "versions": versions(),
            "attention_kernel": attention,
            "environment": environment.recorded(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
    )
    replace_file(run_dir / "provenance.json", json.dumps(attempts, indent=1) + "\n")
    return attempt


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The attempts so far, without entries that are damaged; none where the file is missing or not ours."""
    try:
        found = parse(read_small(Path(run_dir) / "provenance.json"), list[Any])
    except (OSError, ValueError):
        return []
    whole = []
    for entry in found:
        with suppress(ValueError):
            whole.append(checked(entry, Attempt))
    return whole


def versions() -> dict[str, str | None]:
    """Versions of the packages whose change can change a run; None: not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(directory: Path) -> tuple[str | None, str]:
    """The last commit of the program in the checkout at `directory`, and the diff of its tracked files; (None, "")
    where there is none.

    A job's copy of the program is no checkout; `slurm/` keeps both beside it.
    """
    copied, diff = directory / COPIED, directory / f"{COPIED}.diff"
    if copied.is_file():
        changed = diff.read_text(encoding="utf-8", errors="surrogateescape") if diff.is_file() else ""
        return copied.read_text(encoding="utf-8").strip() or None, changed
    top = _git(directory, "rev-parse", "--show-toplevel")
    # An installed package may lie inside some other project's checkout.
    if top is None or Path(top.strip()).resolve() != directory.resolve():
        return None, ""
    commit = _git(directory, "log", "-1", "--format=%H", *PROGRAM)
    diff = _git(directory, "diff", "HEAD", "--no-ext-diff", "--no-color", *PROGRAM)
    return (commit or "").strip() or None, diff or ""


def _git(directory: Path, *arguments: str) -> str | None:
    """Git's answer, or None where there is no git, no checkout or no answer in time."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="surrogateescape")
