"""Damaged small files: one sentence and an exit code of the table, or as if they were not there; never a traceback."""

import json
import shutil
import time
from pathlib import Path

import pytest
from hostile.checker import MEMORY, Outcome, attempt, differences, tree
from hostile.small_files import STEP, Input, inputs, seal
from support.forked import run_forked
from support.programs import TINY, environment, free_port, run
from support.tiny import TinyCorpus

MANY = str(Path(__file__).with_name("many.py"))


@pytest.fixture(scope="module")
def resume(tiny_corpus: TinyCorpus) -> list[str]:
    """Arguments of a run of three steps, each of which is saved."""
    small = ["model.n_layers=1", "train.steps=3", "checkpoint.every=1", "checkpoint.keep=2", "evaluate.batches=1"]
    return [*TINY, *tiny_corpus.overrides(), *small, "observe.layers_every=0"]


@pytest.fixture(scope="module")
def healthy(resume: list[str], tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that stands at step 2, and its text as prepared shards."""
    folder = tmp_path_factory.mktemp("healthy")
    done = run("pretrain", *resume, f"run.dir={folder / 'run'}", "run.stop_after=2")
    assert done.returncode == 75, done.stderr
    shutil.rmtree(folder / "run" / "tensorboard")
    # As after a stop within an evaluation, so that the records are read back too.
    state = folder / "run" / STEP / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"evaluation_due": True}))
    seal(state, state.read_bytes())
    (folder / "run" / "slurm").mkdir()
    begun = {"job": "", "restart": 0, "time": int(time.time()), "from_step": -1, "begun": 0}
    (folder / "run" / "slurm" / "attempts.jsonl").write_text((json.dumps(begun) + "\n") * 2)
    words = ["--source", tiny_corpus.train, "--tokenizer", tiny_corpus.tokenizer, "--out", str(folder / "prepared")]
    prepare = str(Path(MANY).parents[2] / "data" / "prepare.py")
    made = run_forked(
        prepare, [*words, "--workers", "1"], environment(), processes=1, port=free_port(), cwd=None, timeout=60
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


def outcomes(made: list[Input], folder: Path) -> list[Outcome]:
    """What each input's program does, all of them in processes forked from one; nothing outside the inputs changes."""
    jobs, results = folder / "jobs.json", folder / "results.json"
    jobs.write_text(json.dumps([each.line for each in made]))
    own = [results, *(each.folder / name for each in made for name in ("run", "new"))]
    before = tree(folder, own)
    done = run_forked(
        MANY, [str(jobs), str(results)], environment(), processes=1, port=free_port(), cwd=folder,
        timeout=30 + 11 * len(made),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert differences(before, tree(folder, own)) == []
    return [Outcome(*told, changed=()) for told in json.loads(results.read_text())]


def faults(made: list[Input], folder: Path) -> list[str]:
    found = []
    for each, outcome in zip(made, outcomes(made, folder), strict=True):
        wrong = outcome.faults() + (["too much memory"] if outcome.peak_bytes > MEMORY else [])
        found += [f"{each.folder.name} {each.file}: {each.what}: {' '.join(each.line[:2])}: {wrong}"] if wrong else []
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


@pytest.mark.slow
def test_a_few(healthy: Path, resume: list[str], folder: Path):
    made = inputs(healthy, folder, seed=0, count=60, resume=resume)
    assert "\n".join(faults(made, folder)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_many(healthy: Path, resume: list[str], folder: Path, seed: int):
    made = inputs(healthy, folder, seed=seed, count=100, resume=resume)
    assert "\n".join(faults(made, folder)) == ""


@pytest.mark.slow
def test_through_the_programs_themselves(healthy: Path, resume: list[str], folder: Path):
    for each in inputs(healthy, folder, seed=99, count=10, resume=resume):
        script, *arguments = each.line
        own = [each.folder / "run", each.folder / "new"]
        outcome = attempt(script, *arguments, watched=folder, own=own, seconds=30, fresh=True)
        assert outcome.faults() == [], (each.file, each.what)
