"""`evaluate.tasks` and `evaluate.best`: tasks at each evaluation on every engine; the best checkpoint."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.choices import write_items
from support.programs import TINY, command, environment, run, summary
from support.tiny import TinyCorpus

from stablelm.checkpoint import selection
from stablelm.checkpoint.saved_run import read_state
from stablelm.observe.sinks import last_records

ACC = "task/words/acc"


def arguments(corpus: TinyCorpus, folder: Path, *extra: str) -> tuple[str, ...]:
    items = folder / "words.jsonl"
    if not items.exists():
        write_items(items, 12)
    own = (
        "evaluate.every=2",
        f"evaluate.tasks.words={items}",
        "train.steps=6",
        "train.lr=1e-2",
        "train.warmup_steps=1",
    )
    return (*TINY, *corpus.overrides(), *own, f"run.dir={folder / 'run'}", *extra)


def train(corpus: TinyCorpus, folder: Path, *extra: str, processes: int = 1) -> dict[int, dict[str, float]]:
    done = run("pretrain", *arguments(corpus, folder, *extra), processes=processes)
    assert done.returncode in (0, 75), done.stderr
    return last_records(folder / "run" / "metrics.jsonl")


def steps(folder: Path) -> list[str]:
    return [path.name for path in selection.step_directories(folder / "run" / "checkpoints")]


def test_tasks_are_scored_as_the_evaluation_of_the_checkpoint_scores_them(tiny_corpus: TinyCorpus, tmp_path: Path):
    records = train(tiny_corpus, tmp_path, "evaluate.task_items=10")
    scored = [step for step, record in records.items() if ACC in record]
    assert scored == [2, 4, 6]
    assert all({f"{ACC}_norm", "val_loss/default"} <= set(records[step]) for step in scored)
    asked = ("--tasks", str(tmp_path / "words.jsonl"), "--limit", "10", "--out", str(tmp_path / "out.json"))
    done = run("eval", "--checkpoint", str(tmp_path / "run"), *asked)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())["tasks"]["words"]
    assert told["n"] == 10
    assert (told["acc"], told["acc_norm"]) == (records[6][ACC], records[6][f"{ACC}_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero1", "zero3"])
def test_every_engine_scores_what_one_process_scores(kind: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = train(tiny_corpus, tmp_path / "one", "evaluate.best=task/words/acc_norm")
    two = train(tiny_corpus, tmp_path / "two", f"engine.kind={kind}", "evaluate.best=task/words/acc_norm", processes=2)
    for step in (2, 4, 6):
        assert two[step][ACC] == one[step][ACC]
        assert two[step]["val_loss/default"] == pytest.approx(one[step]["val_loss/default"], rel=1e-4)
    assert steps(tmp_path / "one") == steps(tmp_path / "two")


@pytest.mark.slow
def test_a_compiled_model_scores_the_same(tiny_corpus: TinyCorpus, tmp_path: Path):
    import shutil

    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = train(tiny_corpus, tmp_path / "one")
    two = train(tiny_corpus, tmp_path / "two", "train.compile=true", "model.max_seq_len=64")
    assert [two[step][ACC] for step in (2, 4)] == [one[step][ACC] for step in (2, 4)]


def test_the_best_checkpoint_survives_stops(tiny_corpus: TinyCorpus, tmp_path: Path):
    """A rate that is far too high makes the loss worse after its first evaluations."""
    extra = ("evaluate.best=val_loss/default", "checkpoint.keep=1", "train.steps=8", "train.schedule=constant")
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for folder in (unbroken, resumed):
        folder.mkdir()
    records = train(tiny_corpus, unbroken, *extra, "train.lr=0.3", "train.warmup_steps=4")
    values = {step: record["val_loss/default"] for step, record in records.items() if "val_loss/default" in record}
    best = min(values, key=lambda step: values[step])
    assert best < 8, values
    wanted = ["step-00000008", f"step-{best:08d}"]
    assert steps(unbroken) == wanted
    # Stopped where no evaluation is due, and right after the best one.
    for stop in (best - 1, best, best + 1):
        train(tiny_corpus, resumed, *extra, "train.lr=0.3", "train.warmup_steps=4", f"run.stop_after={stop}")
    again = train(tiny_corpus, resumed, *extra, "train.lr=0.3", "train.warmup_steps=4")
    assert {step: again[step]["val_loss/default"] for step in values} == values
    assert steps(resumed) == wanted
    state = read_state(resumed / "run" / "checkpoints" / wanted[0])
    assert state["evaluations"][str(best)]["val_loss/default"] == values[best]
    out = tmp_path / "out.json"
    done = run("eval", "--checkpoint", str(resumed / "run" / "best"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["step"] == best
    assert told["sets"]["default"]["loss"] == pytest.approx(values[best], rel=1e-6)
    begun = ("train.steps=1", f"run.init_from={resumed / 'run' / 'best'}", f"run.dir={tmp_path / 'next'}")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), *begun)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_signal_cuts_a_task_short_and_the_next_attempt_scores_it(tiny_corpus: TinyCorpus, tmp_path: Path):
    write_items(tmp_path / "words.jsonl", 4000)
    extra = ("evaluate.batches=1", "evaluate.best=task/words/acc", "model.d_model=128", "evaluate.micro_batch_size=1")
    line = arguments(tiny_corpus, tmp_path, *extra)
    process = subprocess.Popen(command("pretrain", *line), env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert summary(tmp_path / "run")["step"] == 2
    assert not any(ACC in record for record in last_records(metrics).values())
    write_items(tmp_path / "words.jsonl", 10)
    done = run("pretrain", *line, "run.stop_after=3")
    assert done.returncode == 75, done.stderr
    assert ACC in last_records(metrics)[2]
    assert "2" in read_state(tmp_path / "run" / "checkpoints" / "step-00000003")["evaluations"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("evaluate.tasks.words=no.jsonl", "evaluate.tasks.words: no.jsonl does not exist"),
        ("evaluate.tasks.words=no.txt", "evaluate.tasks.words=no.txt is not a .jsonl file"),
        ("evaluate.tasks.a b=no.jsonl", "the name of a task has only letters"),
        ("evaluate.best=val_loss/defualt", "did you mean val_loss/default?"),
        ("evaluate.best=task/words/accuracy", "did you mean task/words/acc?"),
        ("evaluate.task_items=0", "evaluate.task_items=0 must be at least 1"),
    ],
)
def test_a_mistake_is_found_before_the_start(extra: str, words: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run("pretrain", *arguments(tiny_corpus, tmp_path, extra))
    assert done.returncode == 78
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
