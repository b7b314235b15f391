"""deploy/ssh.sh on two hosts that are processes of this machine: a stop and the resume, and hosts that fail."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.programs import TINY, environment, losses, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

SCRIPT = REPOSITORY / "deploy" / "ssh.sh"
# What sshd does with a command; a host named gone answers as one that does not exist.
SSH = """#!/usr/bin/env bash
while [[ $1 = -* ]]; do [[ $1 = -o ]] && shift; shift; done
if [ "$1" = gone ]; then echo "ssh: cannot resolve gone" >&2; exit 255; fi
echo "$1" >>"$HOSTS_ASKED"
exec setsid bash -c "$2"
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "ssh").write_text(SSH)
    (folder / "bin" / "ssh").chmod(0o755)
    environ = environment(
        PATH=f"{folder / 'bin'}:{os.environ['PATH']}", STABLELM_MASTER="127.0.0.1", STABLELM_PYTHON=sys.executable,
        HOSTS_ASKED=str(folder / "hosts"),
    )  # fmt: skip
    return subprocess.Popen(
        [SCRIPT, *words], cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_stopped_run_ends_with_75_and_finishes_when_run_again(tiny_corpus: TinyCorpus, tmp_path: Path):
    run_dir = tmp_path / "run with a space"
    line = ("--processes", "1", "me@one,two", *TINY, *tiny_corpus.overrides(), "train.steps=60")
    first = start(tmp_path, *line, f"run.dir={run_dir}")
    until(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 1, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75, output
    assert sorted((tmp_path / "hosts").read_text().split()) == ["me@one", "two"]
    stopped = summary(run_dir)
    assert (stopped["exit_code"], stopped["reason"]) == (75, "signal")
    assert [path.name for path in run_dir.glob("checkpoints/step-*")] == [f"step-{stopped['step']:08d}"]

    second = start(tmp_path, *line, f"run.dir={run_dir}")
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert "resumed from" in output
    alone = run("pretrain", *line[3:], f"run.dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def until(done, process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.1)


def test_a_host_that_ssh_cannot_reach_ends_the_others(tiny_corpus: TinyCorpus, tmp_path: Path):
    process = start(tmp_path, "--processes", "1", "one,gone", *TINY, *tiny_corpus.overrides(), "run.dir=run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 80, output
    assert "error: ssh to gone failed or was cut off" in output
    assert not (tmp_path / "run").exists()


def test_mistakes_end_with_78(tmp_path: Path):
    process = start(tmp_path, "one")
    assert "error: say where and what" in process.communicate(timeout=60)[0]
    assert process.returncode == 78
    process = start(tmp_path, "one", "model.n_layer=3", "run.dir=run")
    assert "unknown key model.n_layer" in process.communicate(timeout=60)[0]
    assert process.returncode == 78


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", SCRIPT], check=True)
