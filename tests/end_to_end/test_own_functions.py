"""Runs with a loss and metrics of the user's own: recorded, resumed, refused; and a run that metrics do not change."""

from pathlib import Path

import pytest
from engine.matrix import Cell, equality, single
from support.programs import TINY, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.observe.sinks import last_records

OWN = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
LOSS, METRICS = "train.loss=support.own_hooks:label_smoothing", "observe.metrics=[support.own_hooks:norms]"


def train(corpus: TinyCorpus, run_dir: Path, *extra: str):
    return run("pretrain", *TINY, *corpus.overrides(), "train.steps=6", f"run.dir={run_dir}", *extra, **OWN)  # pyright: ignore[reportArgumentType]


def records(run_dir: Path) -> dict[int, dict]:
    return last_records(run_dir / "metrics.jsonl")


def test_metrics_are_recorded_and_do_not_change_the_run(tiny_corpus: TinyCorpus, tmp_path: Path):
    """With dropout, whose generators the metrics draw from."""
    settings = ("model.dropout=0.1", "observe.every=2", "train.micro_batch_size=4")
    for name, extra in (("without", ()), ("with", (METRICS,))):
        done = train(tiny_corpus, tmp_path / name, *settings, *extra)
        assert done.returncode == 0, done.stderr
    without, found = records(tmp_path / "without"), records(tmp_path / "with")
    assert [without[step]["loss"] for step in without] == [found[step]["loss"] for step in found]
    for step in (2, 4, 6):
        own = {name: value for name, value in found[step].items() if name.startswith("custom/")}
        assert len(own) == 12 and all(value > 0 for value in own.values())
        assert not any(name.startswith("custom/") for name in without[step])


def test_a_loss_of_the_users_own_is_recorded_resumed_and_part_of_the_run(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = train(tiny_corpus, tmp_path / "whole", LOSS, "checkpoint.every=3")
    assert done.returncode == 0, done.stderr
    whole = records(tmp_path / "whole")
    smoothed = [record for record in whole.values() if "objective" in record]
    assert len(smoothed) == 6 and all(record["objective"] != record["loss"] for record in smoothed)
    plain = train(tiny_corpus, tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    first, last = records(tmp_path / "plain")[1], records(tmp_path / "plain")[6]
    assert whole[1]["loss"] == pytest.approx(first["loss"], rel=1e-6), "the same cross-entropy before any update"
    assert whole[6]["loss"] != pytest.approx(last["loss"], rel=1e-6) and "objective" not in last
    stopped = train(tiny_corpus, tmp_path / "run", LOSS, "run.stop_after=3")
    assert stopped.returncode == 75, stopped.stderr
    changed = train(tiny_corpus, tmp_path / "run")
    assert changed.returncode == 78 and "train.loss: saved with support.own_hooks:label_smoothing" in changed.stderr
    assert train(tiny_corpus, tmp_path / "run", LOSS).returncode == 0
    resumed = records(tmp_path / "run")
    for name in ("loss", "objective", "val_loss/default"):
        both = [[own.get(name) for own in each.values()] for each in (whole, resumed)]
        assert both[0] == both[1], name


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.loss=no_such_module:loss", "train.loss=no_such_module:loss: cannot be imported"),
        ("train.loss=support.own_hooks:missing", "does not define missing"),
        ("train.loss=support.own_hooks", "not an import path; write package.module:name"),
        ("train.loss=support.own_hooks:mean", "return the loss of each of the 4 tokens"),
        ("observe.metrics=[support.own_hooks:NUMBER]", "observe.metrics=support.own_hooks:NUMBER: NUMBER is a int"),
    ],
)
def test_a_wrong_one_is_one_sentence_before_anything_is_created(
    argument: str, words: str, tiny_corpus: TinyCorpus, tmp_path: Path
):
    done = train(tiny_corpus, tmp_path / "run", argument)
    assert done.returncode == 78, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_metric_that_fails_ends_the_run_before_its_first_step(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = train(tiny_corpus, tmp_path / "run", "observe.metrics=[support.own_hooks:vector]")
    assert done.returncode == 78, done.stderr
    assert "return a number" in summary(tmp_path / "run")["reason"]
    assert not records(tmp_path / "run")


def test_updates_whose_own_loss_is_not_finite_are_skipped(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = train(tiny_corpus, tmp_path / "run", "train.loss=support.own_hooks:overflows_later", "guards.max_skips=2")
    assert done.returncode == 76, done.stderr
    assert all(record["skipped_steps"] == step for step, record in records(tmp_path / "run").items())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["label_smoothing", "focal"])
def test_a_loss_of_the_users_own_is_the_same_on_every_engine(loss: str):
    """Two micro-batches, recompute, z-loss."""
    settings = [f"train.loss=support.own_hooks:{loss}", "train.lr=1e-2", "train.z_loss=1e-3", "engine.recompute=full"]
    cells: list[Cell] = [("ddp", 2), ("fsdp2", 2), ("zero3", 2)]
    assert max(equality(cells, settings, steps=6).values()) <= 1e-6
    assert single(*settings, steps=6) != single(*settings[1:], steps=6)
