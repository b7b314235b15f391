"""Two starts of one run directory at the same moment: one holds the run, the other says so and touches nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.forked import start_ranks
from support.programs import LAUNCH, TINY, environment, free_port, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.checkpoint import manifest, selection

ATTEMPT = REPOSITORY / "slurm" / "attempt.py"


def begin(line: list[str], output: Path, *, processes: int = 1, **extra: str) -> list[Any]:
    output.mkdir()
    script = str(LAUNCH / "pretrain.py")
    return start_ranks(
        script, line, environment(**extra), processes=processes, port=free_port(), output=output
    )  # fmt: skip


def codes(starts: list[list[Any]]) -> list[set[int]]:
    """Exit codes of the ranks of each start."""
    deadline = time.monotonic() + 120
    for ranks in starts:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
    return [{process.exitcode for process in ranks} for ranks in starts]


def attempt(command: str, run_dir: Path, *arguments: str, job: str) -> str:
    """The first word of what slurm/attempt.py says for a job."""
    line = [sys.executable, str(ATTEMPT), command, str(run_dir), *arguments]
    done = subprocess.run(line, env=environment(SLURM_JOB_ID=job), capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def check_pair(run_dir: Path, ended: list[set[int]], outputs: list[Path]) -> None:
    """One start finished, and it is the one that every file tells of."""
    assert sorted(map(sorted, ended)) == [[0], [78]], [(path / "err").read_text() for path in outputs]
    loser = ended.index({78})
    said = (outputs[loser] / "err").read_text()
    assert said.startswith("error: ") and "Traceback" not in said, said
    told = summary(run_dir)
    assert (told["exit_code"], told["step"]) == (0, 3)
    record = json.loads((run_dir / "attempts" / f"{told['attempts']:08d}.json").read_text())
    assert record["slurm_job"] == f"job{1 - loser}"
    if "at the same moment" in said:
        assert f"attempt 1: process {record['pid']} on {record['host']} since {record['time'][:19]} UTC" in said
        assert [path.name for path in (run_dir / "attempts").iterdir()] == ["00000001.json"]
        assert len(json.loads((run_dir / "provenance.json").read_text())) == 1
        assert {line["attempt"] for line in records(run_dir)} == {1}
    else:
        assert "has taken over" in said
    newest = selection.step_directories(run_dir / "checkpoints")[0]
    assert manifest.read_commit(newest).attempt == str(told["attempts"])
    # torchrun makes 1 of every code, srun passes it on.
    for index, (code,) in enumerate(ended):
        how = ("--rc", str(code)) if code == 0 else ("--rc", "1", "--launcher", "torchrun")
        assert attempt("end", run_dir, *how, job=f"job{index}") == str(code)


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def pair(line: list[str], folder: Path, processes: int = 1, tries: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"start-{index}" for index in range(2)]
    run_dir = folder / "run"
    for index in range(2):
        attempt("begin", run_dir, job=f"job{index}")
    begun = [
        begin([*line, f"run.dir={run_dir}"], output, processes=processes, SLURM_JOB_ID=f"job{index}")
        for index, output in enumerate(outputs)
    ]
    ended = codes(begun)
    if ended == [{0}, {0}] and tries:  # on a busy machine the second may begin after the first has finished
        assert any("nothing to do" in (path / "out").read_text() for path in outputs)
        return pair(line, folder / "again", processes, tries - 1)
    check_pair(run_dir, ended, outputs)


@pytest.fixture
def line(tiny_corpus: TinyCorpus) -> list[str]:
    return [*TINY, *tiny_corpus.overrides(), "train.steps=3", "model.n_layers=1", "checkpoint.every=1"]


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_two_starts_holds_the_run(line: list[str], tmp_path: Path, processes: int):
    pair(line, tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_one_of_two_starts_holds_the_run_each_time(line: list[str], tmp_path: Path, number: int):
    pair(line, tmp_path, 2 if number % 4 == 3 else 1)


@pytest.mark.slow
def test_what_a_killed_attempt_left_refuses_nobody(line: list[str], tmp_path: Path):
    line = [*line, "train.steps=100000", f"run.dir={tmp_path / 'run'}"]
    (process,) = begin(line, tmp_path / "first")
    deadline = time.monotonic() + 60
    while not selection.step_directories(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert run("pretrain", *line, "run.stop_after=200").returncode == 75
    assert summary(tmp_path / "run")["attempts"] == 2


def holder(run_dir: Path, **changed: Any) -> None:
    """What a start leaves that took number 1 just now."""
    (run_dir / "attempts").mkdir(parents=True)
    told = {"host": "elsewhere", "pid": 1, "time": "2026-01-01T00:00:00", "slurm_job": None, **changed}
    (run_dir / "attempts" / "00000001.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changed", "job", "number"),
    [
        ({}, "7", None),
        ({"slurm_job": "6"}, "7", None),
        ({"slurm_job": "7"}, "7", 2),
        ({"host": os.uname().nodename, "pid": 2**22 + 1}, "7", 2),
        ({"host": os.uname().nodename, "pid": os.getpid()}, "7", None),
    ],
    ids=["another host", "another job", "the same job", "a dead process", "a living process"],
)
def test_who_is_refused(tmp_path: Path, monkeypatch, changed: dict, job: str, number: int | None):
    from stablelm.errors import ConfigError
    from stablelm.supervise import attempts

    monkeypatch.setenv("SLURM_JOB_ID", job)
    holder(tmp_path, **changed)
    if number is None:
        with pytest.raises(ConfigError, match="held by another start that began at the same moment"):
            attempts.take(tmp_path, 1)
        assert attempts.newest(tmp_path) == 1
    else:
        assert attempts.take(tmp_path, 1) == number
    assert attempts.take(tmp_path, attempts.newest(tmp_path) + 1) == (number or 1) + 1
