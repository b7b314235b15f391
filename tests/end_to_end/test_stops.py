"""Signals and time limits end a run with a committed checkpoint and exit code 75."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.programs import TINY, command, environment, losses, run, summary
from support.tiny import TinyCorpus

from stablelm.checkpoint.keep import newest_valid, read_state

pytestmark = pytest.mark.slow
ENDLESS = ("train.steps=100000", "train.schedule=constant")


def start(corpus: TinyCorpus, run_dir: Path, *extra: str, processes: int = 1) -> subprocess.Popen[str]:
    line = command("pretrain", *TINY, *corpus.overrides(), f"run.dir={run_dir}", *ENDLESS, *extra, processes=processes)
    return subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_steps(run_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed_step(run_dir: Path) -> int:
    found = newest_valid(run_dir / "checkpoints", on_damaged=lambda path, why: pytest.fail(why))
    assert found is not None
    return read_state(found)["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_asks_to_be_run_again(number: signal.Signals, tiny_corpus: TinyCorpus, tmp_path: Path):
    process = start(tiny_corpus, tmp_path)
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    told = summary(tmp_path)
    assert (told["exit_code"], told["reason"]) == (75, "signal")
    assert committed_step(tmp_path) == told["step"] == max(losses(tmp_path))
    assert "run again to go on" in out


def test_terminals_ctrl_c_under_torchrun_stops_all_ranks_at_one_step(tiny_corpus: TinyCorpus, tmp_path: Path):
    process = start(tiny_corpus, tmp_path, processes=2)
    wait_for_steps(tmp_path, 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher and workers alike
    process.communicate(timeout=90)
    told = summary(tmp_path)
    assert (told["exit_code"], told["reason"]) == (75, "signal")
    assert committed_step(tmp_path) == told["step"]


def test_second_signal_ends_at_once(tiny_corpus: TinyCorpus, tmp_path: Path):
    # A step that takes long enough for a second signal to arrive before it ends.
    slow = ("train.global_batch_size=240", "model.d_model=512", "model.n_layers=12", "train.micro_batch_size=12")
    process = start(tiny_corpus, tmp_path, *slow)
    deadline = time.monotonic() + 120
    assert process.stdout is not None
    while "rehearsal" not in process.stdout.readline():
        assert time.monotonic() < deadline
        assert process.poll() is None
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert "once more ends now" in process.stderr.readline()
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    told = summary(tmp_path)
    assert (told["exit_code"], told["step"]) == (128 + signal.SIGTERM, 0)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_time_limit_leaves_time_for_the_checkpoint(tiny_corpus: TinyCorpus, tmp_path: Path):
    began = time.time()
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}", *ENDLESS, "run.time_limit=25")
    assert done.returncode == 75, done.stderr
    (commit,) = (tmp_path / "checkpoints").glob(f"step-{committed_step(tmp_path):08d}/COMMITTED")
    assert commit.stat().st_mtime - began <= 25
    assert summary(tmp_path)["reason"] == "time limit"
    assert committed_step(tmp_path) == summary(tmp_path)["step"] > 0


def test_stop_after_counts_finished_steps(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}", "run.stop_after=4")
    assert done.returncode == 75, done.stderr
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert committed_step(tmp_path) == 4
