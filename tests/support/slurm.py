"""A throw-away Slurm cluster of several nodes on this machine, and jobs on it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.programs import environment
from support.samples import REPOSITORY

SCRIPT = REPOSITORY / "tests" / "slurm" / "cluster"
PACE = REPOSITORY / "tests" / "slurm" / "pace"
LAST_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


def missing() -> str:
    """Why no cluster can be started here, '' where one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster of namespaces needs root"
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: run tests/slurm/cluster install"
    probe = ["unshare", "--pid", "--net", "--uts", "--mount", "--ipc", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "this machine allows no namespaces"
    return ""


@dataclass
class Cluster:
    """A running cluster; `directory` holds its logs."""

    directory: Path
    environ: dict[str, str] = field(default_factory=dict)

    def control(self, command: str, *arguments: str) -> None:
        """One command of tests/slurm/cluster, as `kill-node node1`."""
        subprocess.run([str(SCRIPT), command, str(self.directory), *arguments], check=True, timeout=120)

    def client(self, *command: str, cwd: str | Path = REPOSITORY, **extra: str) -> str:
        """Output of sbatch, scontrol and the like, run where a user would."""
        program = str(self.directory / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            env=self.environ | extra,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: str, cwd: str | Path = REPOSITORY, **extra: str) -> str:
        """Job id of `sbatch` in `cwd` with the variables `extra`."""
        return self.client("sbatch", "--parsable", *command, cwd=cwd, **extra).strip()

    def about(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        told = self.client("scontrol", "show", "job", "--oneliner", job)
        return {name: value.strip() for name, value in re.findall(r"(\w+)=(.*?)(?= \w[\w:/]*=|\s*$)", told)}

    def wait(self, what: Callable[[], Any], job: str, seconds: float, log: Path | None = None) -> Any:
        """Waits until `what` is true; fails with the job's state and log where it has ended or time is up."""
        end = time.monotonic() + seconds
        while not (found := what()):
            state = self.about(job).get("JobState", "")
            if time.monotonic() > end or (state in LAST_STATES and not what()):
                text = log.read_text() if log and log.exists() else ""
                raise AssertionError(f"job {job} is {state}: {self.about(job)}\n{text[-6000:]}")
            time.sleep(0.2)
        return found

    def wait_done(self, job: str, seconds: float, log: Path | None = None) -> dict[str, str]:
        return self.wait(
            lambda: (told := self.about(job)).get("JobState") in LAST_STATES and told, job, seconds, log
        )  # fmt: skip


@contextlib.contextmanager
def cluster(nodes: int, **settings: str) -> Iterator[Cluster]:
    """Starts one; ends it with everything in it. `settings`: STC_... of tests/slurm/cluster."""
    directory = Path(tempfile.mkdtemp(prefix="stc.", dir="/tmp"))  # sockets need a short path
    environ = environment(**settings)
    subprocess.run([str(SCRIPT), "up", str(nodes), str(directory)], env=environ, check=True, timeout=120)
    environ["SLURM_CONF"] = str(directory / "etc" / "slurm.conf")
    environ["PATH"] = os.pathsep.join([str(directory / "bin"), str(Path(sys.executable).parent), environ["PATH"]])
    try:
        yield Cluster(directory, environ)
    finally:
        subprocess.run([str(SCRIPT), "down", str(directory)], check=True, timeout=120)
        shutil.rmtree(directory, ignore_errors=True)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole record of metrics.jsonl, those of steps made again included."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if "loss" in record]


def reached(run_dir: Path, step: int, attempt: int = 1) -> bool:
    """Whether that attempt, or a later one, has made that step."""
    return any(record["step"] >= step and record["attempt"] >= attempt for record in records(run_dir))
