"""launch/node.py: hosts that share nothing but a place for checkpoints, stops at any moment, mistakes."""

import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.programs import TINY, command, environment, free_port, losses, run, summary
from support.stores import s3_server
from support.tiny import TinyCorpus


def start(folder: Path, *arguments: str, environ: Mapping[str, str] | None = None, **options) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command("node", *arguments), cwd=folder, env=environment(**(environ or {})), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_hosts_that_are_lost_go_on_from_the_checkpoints_alone(tiny_corpus: TinyCorpus, tmp_path: Path):
    """As spot instances: every attempt has new disks, and run.dir is on each host's own."""
    line = [*TINY, *tiny_corpus.overrides(), "run.dir=run"]
    with s3_server() as store:
        line += ["checkpoint.dir=s3://bucket/run"]
        for attempt, more, code in ((1, "run.stop_after=6", 75), (2, "observe.every=1", 0)):
            hosts = ["--nodes", "2", "--master", f"127.0.0.1:{free_port()}", "--processes", "1"]
            asked = [*hosts, *line, more]
            nodes = [
                start(tmp_path / f"{attempt}-{rank}", *asked, "--node-rank", str(rank), environ=store)
                for rank in (0, 1)
            ]
            outputs = [node.communicate(timeout=240)[0] for node in nodes]
            assert [node.returncode for node in nodes] == [code, code], outputs
        other = run("pretrain", *line, "train.lr=1", cwd=tmp_path, launcher="python", **store)  # type: ignore[arg-type]
    assert other.returncode == 78 and not (tmp_path / "run").exists()
    assert "checkpoint.dir=s3://bucket/run belongs to a run with other settings" in other.stderr
    assert not (tmp_path / "2-1" / "run" / "summary.json").exists()
    alone = run("pretrain", *line[:-1], cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    found = losses(tmp_path / "1-0" / "run") | losses(tmp_path / "2-0" / "run")
    assert found == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert min(losses(tmp_path / "2-0" / "run")) == 7


def test_a_stop_before_the_ranks_have_begun_ends_with_75(tiny_corpus: TinyCorpus, tmp_path: Path):
    """The host waits for another one that never comes."""
    hosts = ("--nodes", "2", "--node-rank", "1", "--master", f"127.0.0.1:{free_port()}", "--processes", "1")
    for stop in ("signal", "end of input"):
        node = start(tmp_path, *hosts, "--stop-with-stdin", *TINY, *tiny_corpus.overrides(), stdin=subprocess.PIPE)
        while not catches(signal.SIGTERM, node.pid):
            assert node.poll() is None
            time.sleep(0.05)
        node.send_signal(signal.SIGTERM) if stop == "signal" else node.communicate(timeout=60)
        assert node.wait(timeout=60) == 75
    assert not (tmp_path / "runs").exists()


def catches(number: int, pid: int) -> bool:
    """Whether a process has a handler for the signal."""
    (caught,) = re.findall(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(caught, 16) >> (number - 1) & 1 == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2"], "--master '' must be HOST:PORT of host 0 where --nodes is 2"),
        (["--nodes", "2", "--node-rank", "2", "--master", "a:1"], "--node-rank 2 must be from 0 to below --nodes 2"),
        (["--processes", "0"], "--processes 0 must be at least 1"),
        (["--confg", "x.yaml"], "unknown option --confg, did you mean --config?"),
        (["model.n_layer=3"], "unknown key model.n_layer, did you mean model.n_layers?"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str, tmp_path: Path):
    done = run("node", *arguments, cwd=tmp_path)
    assert done.returncode == 78
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_code_is_a_ranks_own(tiny_corpus: TinyCorpus, tmp_path: Path):
    faults = ("faults.allow=true", "faults.bad_batch=2", "guards.max_skips=0")
    node = start(tmp_path, "--processes", "1", *TINY, *tiny_corpus.overrides(), *faults, "run.dir=run")
    output, _ = node.communicate(timeout=240)
    assert (node.returncode, summary(tmp_path / "run")["exit_code"]) == (76, 76), output
