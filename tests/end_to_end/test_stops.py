"""Signals and time limits end a run with a committed checkpoint and exit code 75."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.programs import TINY, command, environment, losses, run, summary
from support.tiny import TinyCorpus

from stablelm.checkpoint.saved_run import read_state
from stablelm.checkpoint.selection import newest_valid
from stablelm.observe.sinks import last_records

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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
    assert "run again to continue" in out


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
    while "dry run" not in process.stdout.readline():
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


# An evaluation of 280 batches, which takes far longer than a step.
LONG_EVALUATION = (
    "evaluate.batches=30", "evaluate.micro_batch_size=1", "model.d_model=256", "model.n_layers=12", "run.seed=3",
)  # fmt: skip


def recorded(run_dir: Path) -> dict[int, dict]:
    return last_records(run_dir / "metrics.jsonl")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_cuts_an_evaluation_short_and_the_next_attempt_makes_it(
    processes: int, tiny_corpus: TinyCorpus, tmp_path: Path
):
    evaluating = (*LONG_EVALUATION, "evaluate.every=2")
    line = [*TINY, *tiny_corpus.overrides(), *ENDLESS, *evaluating, f"run.dir={tmp_path / 'cut'}"]
    process = start(tiny_corpus, tmp_path / "cut", *evaluating, processes=processes)
    wait_for_steps(tmp_path / "cut", 2, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    stopped = time.monotonic() - began
    told = summary(tmp_path / "cut")
    assert (told["exit_code"], told["reason"], told["step"]) == (75, "signal", 2)
    assert committed_step(tmp_path / "cut") == 2
    assert "val_loss/default" not in recorded(tmp_path / "cut")[2]
    began = time.monotonic()
    again = run("pretrain", *line, "run.stop_after=3", processes=processes)
    assert summary(tmp_path / "cut")["exit_code"] == 75, again.stderr
    assert stopped < (time.monotonic() - began) / 2  # which makes the whole evaluation
    whole = [f"run.dir={tmp_path / 'whole'}" if item.startswith("run.dir") else item for item in line]
    run("pretrain", *whole, "run.stop_after=3", processes=processes)
    (cut, undisturbed) = (recorded(tmp_path / name) for name in ("cut", "whole"))
    for step, name in ((2, "loss"), (2, "val_loss/default"), (3, "loss")):
        assert cut[step][name] == undisturbed[step][name]


def test_the_last_evaluation_may_be_cut_short_too(tiny_corpus: TinyCorpus, tmp_path: Path):
    extra = (*LONG_EVALUATION, "train.steps=2")
    process = start(tiny_corpus, tmp_path, *extra)
    wait_for_steps(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, summary(tmp_path)["step"]) == (75, 2)
    line = [*TINY, *tiny_corpus.overrides(), *ENDLESS, *extra, f"run.dir={tmp_path}"]
    finished = run("pretrain", *line)
    assert finished.returncode == 0, finished.stderr
    assert summary(tmp_path)["val_loss"]["default"] == recorded(tmp_path)[2]["val_loss/default"]
    assert {"loss", "val_loss/default"} <= set(recorded(tmp_path)[2])
    assert "nothing to do" in run("pretrain", *line).stdout


def test_time_limit_leaves_time_for_evaluations(tiny_corpus: TinyCorpus, tmp_path: Path):
    """Evaluations and measurements of the layers at every step: wherever the limit comes, the commit is in time."""
    extra = (*LONG_EVALUATION, "evaluate.every=1", "observe.layers_every=1", "run.time_limit=25")
    began = time.time()
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}", *ENDLESS, *extra)
    assert done.returncode == 75, done.stderr
    (commit,) = (tmp_path / "checkpoints").glob(f"step-{committed_step(tmp_path):08d}/COMMITTED")
    assert commit.stat().st_mtime - began <= 25
    assert summary(tmp_path)["reason"] == "time limit"


def test_torchrun_restarts_after_a_rank_has_crashed(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = [*TINY, *tiny_corpus.overrides(), "train.steps=8", "checkpoint.every=2", "engine.kind=fsdp2"]
    crash = ["faults.allow=true", "faults.crash=[1,6]", f"run.dir={tmp_path / 'run'}"]
    whole = run("pretrain", *line, f"run.dir={tmp_path / 'whole'}", processes=2)
    assert summary(tmp_path / "whole")["exit_code"] == 0, whole.stderr
    started = command("pretrain", *line, *crash, processes=2)
    position = started.index("torch.distributed.run") + 1
    started[position:position] = ["--max_restarts=2"]
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path / "run")
    assert (told["exit_code"], told["attempts"], told["step"]) == (0, 2, 8)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


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
