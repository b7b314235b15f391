"""Whole runs over bad storage, S3 and each other: what the parts promise holds through `launch/pretrain.py`."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.forked import start_forked
from support.programs import LAUNCH, TINY, environment, losses, run, summary
from support.saved import flip_bit
from support.stores import s3_server
from support.tiny import TinyCorpus

from stablelm.checkpoint import manifest, selection
from stablelm.checkpoint.remote_path import RemotePath

pytestmark = pytest.mark.slow
EVERY = ("checkpoint.every=2", "train.steps=10")


def arguments(corpus: TinyCorpus, run_dir: Path, *extra: str) -> list[str]:
    return [*TINY, *corpus.overrides(), f"run.dir={run_dir}", *EVERY, *extra]


def test_a_run_goes_on_from_an_object_store(tiny_corpus: TinyCorpus, tmp_path: Path):
    with s3_server() as variables:
        root = RemotePath("s3://bucket/run")
        assert run("pretrain", *arguments(tiny_corpus, tmp_path / "whole")).returncode == 0
        for stop, code in ((["run.stop_after=5"], 75), ([], 0)):
            line = arguments(tiny_corpus, tmp_path / "run", f"checkpoint.dir={root}", "checkpoint.keep=1", *stop)
            # A fresh python: fsspec takes its settings from the environment when it is imported.
            done = run("pretrain", *line, launcher="python", **variables)  # type: ignore[arg-type]
            assert done.returncode == code, done.stderr
        assert f"resumed from {root}/step-00000005/00000001-" in done.stdout
        (left,) = selection.step_directories(root)
        assert (manifest.step_of(left), manifest.read_commit(left).token) == (10, 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_flipped_bits_are_not_resumed_from(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = arguments(tiny_corpus, tmp_path, "run.stop_after=6", "checkpoint.keep=3")
    assert run("pretrain", *line).returncode == 75
    newest, *older = selection.step_directories(tmp_path / "checkpoints")
    draw = random.Random(3)
    for path, name in ((newest, "tensors/rank-00000-0.safetensors"), (older[0], "COMMITTED")):
        flip_bit(Path(str(path / name)), draw.randrange(8 * (path / name).stat().st_size))
    done = run("pretrain", *line)
    assert done.returncode == 75, done.stderr
    for path in (newest, older[0]):
        assert f"warning: {path} is damaged" in done.stdout
    assert f"resumed from {older[1]}" in done.stdout
    assert manifest.verify(newest) == []  # saved anew; what was damaged is kept aside
    assert len(list((tmp_path / "checkpoints").glob("damaged-*"))) == 2
    for path in selection.step_directories(tmp_path / "checkpoints"):
        flip_bit(Path(str(path / "state.json")), draw.randrange(800))
    done = run("pretrain", *line)
    assert done.returncode == 78
    assert "is intact" in done.stderr


FULL_AT_STEP = """
import errno, runpy, sys
sys.path.insert(0, {repository!r})
from stablelm.checkpoint import commit
save = commit.save_tensors
def full(directory, *rest):
    if "-00000004-" in str(directory):
        raise OSError(errno.ENOSPC, "No space left on device")
    return save(directory, *rest)
commit.save_tensors = full
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_disk_that_fills_behind_the_loop_ends_the_run_soon(tiny_corpus: TinyCorpus, tmp_path: Path):
    program = tmp_path / "full.py"
    program.write_text(FULL_AT_STEP.format(repository=str(LAUNCH.parent)))
    extra = ("train.steps=100000", "train.schedule=constant", "checkpoint.every=4")
    line = [
        sys.executable,
        str(program),
        str(LAUNCH / "pretrain.py"),
        *arguments(tiny_corpus, tmp_path / "run", *extra),
    ]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 74, done.stderr
    assert "no space for a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    told = summary(tmp_path / "run")
    assert (told["exit_code"], told["checkpointed_step"]) == (74, -1)
    assert told["step"] <= 8


def test_a_second_attempt_takes_over_and_the_first_commits_nothing_more(tiny_corpus: TinyCorpus, tmp_path: Path):
    endless = ("train.steps=100000", "train.schedule=constant", "checkpoint.every=40", "checkpoint.keep=1000000")
    line = arguments(tiny_corpus, tmp_path, *endless)
    first, second = (tmp_path / name for name in ("first", "second"))
    first.mkdir()
    second.mkdir()
    older = start_forked(str(LAUNCH / "pretrain.py"), line, environment(), output=first)
    deadline = time.monotonic() + 120
    while len(selection.step_directories(tmp_path / "checkpoints")) < 2:
        assert older.exitcode is None, (first / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    newer = start_forked(str(LAUNCH / "pretrain.py"), line, environment(), output=second)
    older.join(120)
    err = (first / "err").read_text()
    assert older.exitcode == 78, err
    assert "attempt 2 on" in err and "has taken over" in err
    while summary_step(tmp_path) < 1:
        assert newer.exitcode is None, (second / "err").read_text()
        assert time.monotonic() < deadline + 120
        time.sleep(0.05)
    newer.terminate()
    newer.join(60)
    assert newer.exitcode == 75
    tokens = [manifest.read_commit(path).token for path in selection.step_directories(tmp_path / "checkpoints")]
    assert tokens == sorted(tokens, reverse=True)
    assert set(tokens) == {1, 2}


def summary_step(run_dir: Path) -> int:
    """How many checkpoints the second attempt has committed."""
    steps = selection.step_directories(run_dir / "checkpoints")
    return sum(manifest.read_commit(path).token == 2 for path in steps)
