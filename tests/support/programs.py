"""Starts our programs as a user does: plain python, torchrun or accelerate launch, on CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from support.forked import run_forked
from support.samples import REPOSITORY

LAUNCH = REPOSITORY / "launch"
LAUNCHERS = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")


def environment(**extra: str) -> dict[str, str]:
    """This process's variables without any launcher's, one thread a process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **extra}


def command(program: str, *arguments: str, processes: int = 1, launcher: str = "") -> list[str]:
    """The command line for `launch/<program>.py`; launcher: '', 'torchrun' or accelerate's own flags."""
    script = str(LAUNCH / f"{program}.py")
    if not launcher and processes == 1:
        return [sys.executable, script, *arguments]
    if launcher in ("", "torchrun"):
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        start += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    else:
        start = ["-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1"]
        start += [f"--main_process_port={free_port()}", *launcher.split()]
    return [sys.executable, *start, script, *arguments]


def run(
    program: str, *arguments: str, processes: int = 1, launcher: str = "", timeout: float = 240,
    cwd: Path | None = None, **extra: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs to the end; the caller checks the return code. launcher: as for `command`, and 'python' for a fresh one.

    Without a launcher the processes are forked with torch imported, several as torchrun would start them.
    """
    environ = environment(**extra)
    if not launcher:
        script, port = str(LAUNCH / f"{program}.py"), free_port()
        return run_forked(
            script, list(arguments), environ, processes=processes, port=port, cwd=cwd, timeout=timeout
        )  # fmt: skip
    return subprocess.run(
        command(program, *arguments, processes=processes, launcher="" if launcher == "python" else launcher),
        env=environ, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# A model that trains in seconds; dropout off and a gentle start, so that runs can be compared.
TINY = (
    "model.n_layers=3",
    "model.d_model=32",
    "model.n_heads=2",
    "data.seq_len=32",
    "data.lanes=12",
    "train.steps=20",
    "train.global_batch_size=12",
    "train.lr=3e-4",
    "train.warmup_steps=100",
    "observe.every=1",
    "observe.page=false",
    "evaluate.every=0",
    "evaluate.batches=2",
    "checkpoint.every=0",
)


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step; a step that was made again counts as made last."""
    from stablelm.observe.sinks import last_records

    return {
        step: record["loss"] for step, record in last_records(run_dir / "metrics.jsonl").items() if "loss" in record
    }


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())
