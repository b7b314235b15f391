"""What follows an attempt's end, by code, history and limits; no Slurm needed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.programs import environment, free_port
from support.samples import REPOSITORY

from stablelm.supervise.requeue_policy import decide, true_code

DEFAULTS = {"attempt": 1, "limit": 100, "fruitless": 0, "outages": 0, "backoff": 120}


@pytest.mark.parametrize(
    ("code", "action"),
    [(0, "finished"), (74, "end"), (75, "requeue"), (76, "end"), (77, "requeue"), (78, "end"), (80, "requeue"),
     (137, "requeue"), (1, "end"), (139, "end")],
)  # fmt: skip
def test_the_codes(code: int, action: str):
    assert decide(code, "", **DEFAULTS | {"outages": 1}).action == action


def test_an_outage_waits_twice_as_long_each_time_but_never_over_an_hour():
    waits = [decide(77, "", **DEFAULTS | {"outages": n}).wait for n in (1, 2, 3, 9)]
    assert waits == [120, 240, 480, 3600]


def test_three_fruitless_attempts_end_with_79_but_never_hide_a_final_code():
    assert decide(80, "", **DEFAULTS | {"fruitless": 2}).action == "requeue"
    assert decide(80, "hung", **DEFAULTS | {"fruitless": 3}).code == 79
    assert decide(76, "", **DEFAULTS | {"fruitless": 3}).code == 76
    assert decide(0, "", **DEFAULTS | {"fruitless": 3}).code == 0


def test_the_attempt_limit_and_stop_after_end_the_job():
    assert decide(75, "signal", **DEFAULTS | {"attempt": 99}).action == "requeue"
    assert decide(75, "signal", **DEFAULTS | {"attempt": 100}).action == "end"
    assert decide(75, "run.stop_after", **DEFAULTS).action == "end"


def test_the_summary_is_the_truth_if_it_is_of_this_attempt():
    summary = {"exit_code": 77, "reason": "gone", "attempts": 3}
    assert true_code(137, summary, before=2, started=3, launcher="srun") == (77, "gone")
    assert true_code(137, summary, before=3, started=4, launcher="srun")[0] == 137
    assert true_code(143, summary, before=3, started=4, launcher="srun")[0] == 137
    cut_short = {"exit_code": 143, "reason": "second signal", "attempts": 3}  # by the time limit or a preemption
    assert true_code(143, cut_short, before=2, started=3, launcher="srun")[0] == 137
    assert true_code(78, {}, before=0, started=0, launcher="srun")[0] == 78
    assert true_code(1, {}, before=0, started=0, launcher="torchrun")[0] == 1
    assert true_code(1, {}, before=0, started=1, launcher="torchrun")[0] == 137
    assert true_code(0, {}, before=0, started=1, launcher="srun")[0] == 1


def attempt(*arguments: str, restart: int = 0) -> subprocess.CompletedProcess[str]:
    environ = environment(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restart))
    command = [sys.executable, str(REPOSITORY / "slurm" / "attempt.py"), *arguments]
    return subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_attempts_that_dead_nodes_cut_off_count_too(tmp_path: Path):
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    for restart in range(3):
        assert attempt("begin", str(tmp_path), restart=restart).returncode == 0
    done = attempt("begin", str(tmp_path), restart=3)
    assert done.returncode == 79 and "3 attempts in a row without a new commit" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["exit_code"] == 79
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    assert attempt("begin", str(tmp_path), restart=3).returncode == 0


def test_a_study_file_lists_what_is_left_to_do(tmp_path: Path):
    study = tmp_path / "runs.txt"
    config = REPOSITORY / "configs" / "quickstart.yaml"
    study.write_text(f"# a study\n{config} run.dir={tmp_path}/a\n\n{config} run.dir='{tmp_path}/b c' # new\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text('{"exit_code": 0}')
    assert attempt("unfinished", str(study)).stdout == "4\n"
    assert attempt("line", str(study), "4").stdout.split("\0") == [str(config), f"run.dir={tmp_path}/b c", ""]
    study.write_text(f"{config} run.dir={tmp_path}/a\n{config} run.dir={tmp_path}/a\n")
    done = attempt("unfinished", str(study))
    assert done.returncode == 78 and "is that of line 1" in done.stderr


def preflight(run_dir: Path, now: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "slurm" / "preflight.py"), str(run_dir), now or str(time.time())]
    return subprocess.run(
        command, env=environment(SLURMD_NODENAME="gpu7", **extra), capture_output=True, text=True, check=False
    )  # fmt: skip


def nvidia_smi(folder: Path, *lines: str, code: int = 0) -> str:
    """PATH with an nvidia-smi that prints `lines`."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_preflight_names_node_and_mend(tmp_path: Path):
    done = preflight(tmp_path)
    assert done.returncode == 1 and "pre-flight: gpu7: error:" in done.stdout and "share" in done.stdout
    (tmp_path / "slurm").mkdir()
    assert preflight(tmp_path).returncode == 0
    late = preflight(tmp_path, now="1")
    assert late.returncode == 0 and "warning: its clock differs" in late.stdout


def test_preflight_counts_gpus_and_their_errors(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    asked = {"SLURM_GPUS_ON_NODE": "2"}
    whole = nvidia_smi(tmp_path / "a", "0, 1, 0", "1, 1, [N/A]")
    assert preflight(tmp_path, PATH=whole, **asked).returncode == 0
    fewer = preflight(tmp_path, PATH=nvidia_smi(tmp_path / "b", "0, 1, 0"), **asked)
    assert fewer.returncode == 1 and "shows 1 of 2 GPUs" in fewer.stdout
    broken = preflight(tmp_path, PATH=nvidia_smi(tmp_path / "c", "0, 1, 0", "1, 1, 4"), **asked)
    assert broken.returncode == 1 and "GPU 1 has 4 uncorrected memory errors" in broken.stdout
    hangs = preflight(tmp_path, PATH=nvidia_smi(tmp_path / "d", code=15), **asked)
    assert hangs.returncode == 1 and "nvidia-smi fails" in hangs.stdout


def test_preflight_meets_at_the_head(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    port = free_port()
    shared = {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo"}
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: preflight(tmp_path, SLURM_PROCID=rank, **shared), ("0", "1")))
    assert [done.returncode for done in found] == [0, 0], found
    with socket.create_server(("127.0.0.1", port)):
        taken = preflight(tmp_path, SLURM_PROCID="0", **shared)
    assert taken.returncode == 1 and "cannot listen" in taken.stdout


def test_shell_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(map(str, (REPOSITORY / "slurm").glob("*.sh")))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
