"""A process of the data that the kernel ends: the run ends with 80, and the next attempt goes on."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from support.forked import start_forked
from support.programs import LAUNCH, TINY, environment, run, summary
from support.tiny import TinyCorpus


def children(pid: int) -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [child for child in found if b"stablelm.data.workers" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.timeout(120)
def test_a_killed_data_worker_ends_with_80(tiny_corpus: TinyCorpus, tmp_path: Path):
    run_dir, output = tmp_path / "run", tmp_path / "output"
    output.mkdir()
    line = [*TINY, *tiny_corpus.overrides(), "train.steps=100000", "checkpoint.every=5", f"run.dir={run_dir}"]
    line += ["data.workers=1", "data.worker_kind=process"]
    process = start_forked(str(LAUNCH / "pretrain.py"), line, environment(), output=output)
    while not (run_dir / "checkpoints" / "step-00000005").exists():
        assert process.exitcode is None, (output / "err").read_text()
        time.sleep(0.05)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.join(60)
    said = (output / "err").read_text()
    assert process.exitcode == summary(run_dir)["exit_code"] == 80, said
    assert "killed by signal SIGKILL, perhaps because memory ran out" in said
    assert "Traceback" not in said
    reached = summary(run_dir)["step"]
    assert run("pretrain", *line, f"run.stop_after={reached + 2}").returncode == 75
