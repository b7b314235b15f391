"""A run that is killed and resumed is the run that was not."""

import random
import time
from pathlib import Path

import pytest
from support.forked import start_forked
from support.programs import LAUNCH, TINY, environment, losses, run, summary
from support.tiny import TinyCorpus

from stablelm.observe.sinks import read_metrics

pytestmark = pytest.mark.slow
STEPS = 40
DROPOUT = ("model.dropout=0.1", f"train.steps={STEPS}", "checkpoint.every=4", "data.workers=2")


def arguments(corpus: TinyCorpus, run_dir: Path, *extra: str) -> list[str]:
    return [*TINY, *corpus.overrides(), f"run.dir={run_dir}", *extra]


def records(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_after(seconds: float, records_first: int, run_dir: Path, program_arguments: list[str], output: Path) -> None:
    """Starts the program and kills it, with no warning, `seconds` after it has written that many more records."""
    before = records(run_dir)
    process = start_forked(str(LAUNCH / "pretrain.py"), program_arguments, environment(), output=output)
    deadline = time.monotonic() + 120
    while records(run_dir) < before + records_first:
        assert process.exitcode is None, (output / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()


def test_three_kills_leave_no_trace(tiny_corpus: TinyCorpus, tmp_path: Path):
    undisturbed = run("pretrain", *arguments(tiny_corpus, tmp_path / "whole", *DROPOUT))
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = tmp_path / "killed"
    moments = random.Random(5)
    for _ in range(3):
        line = arguments(tiny_corpus, killed, *DROPOUT)
        kill_after(moments.uniform(0, 0.2), moments.randint(2, 10), killed, line, tmp_path)
    last = run("pretrain", *arguments(tiny_corpus, killed, *DROPOUT))
    assert last.returncode == 0, last.stderr
    assert "resumed from" in last.stdout
    assert losses(killed) == losses(tmp_path / "whole")
    assert sorted(losses(killed)) == list(range(1, STEPS + 1))
    assert summary(killed)["attempts"] == 4
    assert summary(killed)["val_loss"] == summary(tmp_path / "whole")["val_loss"]
    assert not list((killed / "checkpoints").glob(".staging-*"))


def test_two_processes_go_on_under_other_engines_with_dropout(tiny_corpus: TinyCorpus, tmp_path: Path):
    """Masks depend on the step and the rank alone, so they stay the same in every engine of two processes."""
    extra = (*DROPOUT, "train.steps=9", "engine.recompute=full")
    attempts = [("fsdp2", 3), ("zero3", 5), ("zero1", 7), ("ddp", 9)]
    for name, stops in (("whole", [("fsdp2", 9)]), ("parts", attempts)):
        for engine, stop in stops:
            settings = (f"engine.kind={engine}", f"run.stop_after={stop}")
            done = run("pretrain", *arguments(tiny_corpus, tmp_path / name, *extra, *settings), processes=2)
            assert summary(tmp_path / name)["exit_code"] == (75 if stop < 9 else 0), done.stderr
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(found) == sorted(expected) == list(range(1, 10))
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-6


def test_world_size_may_change_between_attempts(tiny_corpus: TinyCorpus, tmp_path: Path):
    whole = run("pretrain", *arguments(tiny_corpus, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    elastic = tmp_path / "elastic"
    for processes, stop in ((1, ["run.stop_after=7"]), (2, ["run.stop_after=13"]), (4, [])):
        done = run("pretrain", *arguments(tiny_corpus, elastic, *stop), processes=processes)
        assert summary(elastic)["exit_code"] == (75 if stop else 0), done.stderr
    expected, found = losses(tmp_path / "whole"), losses(elastic)
    assert sorted(found) == sorted(expected)
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-6


def test_a_mixture_with_masked_documents_goes_on_in_another_world_size(tiny_corpus: TinyCorpus, tmp_path: Path):
    files = sorted(Path(tiny_corpus.folder, "train").glob("*.json.gz"))
    mixed = (
        f"data.mixture={{web: {{path: [{files[0]}, {files[1]}], weight: 0.7}}, "
        f"code: {{path: {files[2]}, weight: {{0: 0.3, 8: 0.9}}}}}}",
        "data.document_mask=true",
        "train.steps=14",
    )
    base = [
        argument for argument in arguments(tiny_corpus, tmp_path) if not argument.startswith(("data.path", "run.dir"))
    ]
    whole = run("pretrain", *base, *mixed, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    for processes, stop in ((2, ["run.stop_after=6"]), (1, [])):
        done = run("pretrain", *base, *mixed, f"run.dir={tmp_path / 'parts'}", *stop, processes=processes)
        assert summary(tmp_path / "parts")["exit_code"] == (75 if stop else 0), done.stderr
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(found) == sorted(expected) == list(range(1, 15))
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-6
    (*_, last) = (each for each in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in each)
    assert {"data_epoch/web", "data_epoch/code"} <= set(last)


def test_a_longer_run_goes_on_where_the_schedule_allows_it(tiny_corpus: TinyCorpus, tmp_path: Path):
    constant = ("train.schedule=constant", "train.warmup_steps=3")
    assert run("pretrain", *arguments(tiny_corpus, tmp_path / "run", *constant, "train.steps=5")).returncode == 0
    again = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", *constant, "train.steps=5"))
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    longer = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", *constant, "train.steps=8"))
    assert longer.returncode == 0, longer.stderr
    whole = run("pretrain", *arguments(tiny_corpus, tmp_path / "whole", *constant, "train.steps=8"))
    assert whole.returncode == 0, whole.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_new_run_from_the_weights_of_another(tiny_corpus: TinyCorpus, tmp_path: Path):
    first = run("pretrain", *arguments(tiny_corpus, tmp_path / "first", "train.steps=6"))
    assert first.returncode == 0, first.stderr
    settings = ("train.steps=2", "train.lr=1e-9", f"run.init_from={tmp_path / 'first'}", "run.seed=9")
    second = run("pretrain", *arguments(tiny_corpus, tmp_path / "second", *settings))
    assert second.returncode == 0, second.stderr
    before, after = summary(tmp_path / "first")["val_loss"], summary(tmp_path / "second")["val_loss"]
    assert after["default"] == pytest.approx(before["default"], rel=1e-6)
    misfit = run("pretrain", *arguments(tiny_corpus, tmp_path / "third", *settings, "model.d_model=64"))
    assert misfit.returncode == 78
    assert "does not fit this model" in misfit.stderr
