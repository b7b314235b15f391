"""What a run reads back of its directory, damaged: a sentence and 78, or the checkpoint before."""

import json
import shutil
from pathlib import Path

import pytest
from hostile.small_files import seal
from support.programs import TINY, run
from support.tiny import TinyCorpus


@pytest.fixture(scope="module")
def begun(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that stands at step 2 of 3, and its command line but for run.dir."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    line = [*TINY, *tiny_corpus.overrides(), "model.n_layers=1", "train.steps=3", "checkpoint.every=1"]
    assert run("pretrain", *line, f"run.dir={run_dir}", "run.stop_after=2").returncode == 75
    return run_dir, line


@pytest.fixture
def copy(begun: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    shutil.copytree(begun[0], tmp_path / "run")
    return tmp_path / "run", [*begun[1], f"run.dir={tmp_path / 'run'}"]


def test_another_identity_than_json_is_bad_input(copy: tuple[Path, list[str]]):
    run_dir, line = copy
    (run_dir / "identity.json").write_text("[1]")
    done = run("pretrain", *line)
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "without a readable identity.json (Input should be a valid dictionary)" in done.stderr


def test_a_state_of_another_step_than_its_commit_is_damage(copy: tuple[Path, list[str]]):
    run_dir, line = copy
    state = run_dir / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 1}))
    seal(state, state.read_bytes())
    done = run("pretrain", *line)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "is damaged (state.json is of step 1, COMMITTED of step 2); trying the one before it" in said
    assert "step-00000001" in said.partition("resumed from ")[2][:300]


def test_a_bad_line_within_the_records_is_named(copy: tuple[Path, list[str]]):
    run_dir, line = copy
    state = run_dir / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"evaluation_due": True}))
    seal(state, state.read_bytes())
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1, "loss\0\0\n' + metrics.read_bytes())
    done = run("pretrain", *line)
    assert done.returncode == 78
    assert f"{metrics}:1: not a record (not JSON: " in done.stderr
    assert "Traceback" not in done.stderr
