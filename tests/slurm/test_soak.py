"""A short soak: the program that punishes a run for an hour, its checks and its page work."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import environment
from support.samples import REPOSITORY
from support.slurm import missing


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
@pytest.mark.timeout(1200)
def test_a_run_survives_two_faults(tmp_path: Path):
    if reason := missing():
        pytest.skip(reason)
    options = ["--faults", "2", "--kinds", "rank killed,preempted", "--folder", str(tmp_path / "soak")]
    command = [str(REPOSITORY / "tests" / "slurm" / "soak.sh"), *options, "--out", str(tmp_path / "soak.md")]
    done = subprocess.run(
        command, env=environment(STABLELM_PYTHON=sys.executable), capture_output=True, text=True, check=False
    )
    log = tmp_path / "soak" / "job.out"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-6000:] if log.exists() else "")
    told = (tmp_path / "soak.md").read_text()
    assert "2 faults of 2 kinds struck a run of 80 steps" in told
    assert "The run finished by itself." in told and "| rank killed | 1 |" in told
