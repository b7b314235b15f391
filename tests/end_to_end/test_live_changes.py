"""Batch ramps and settings that change at a checkpoint: killed, resumed elsewhere, equal to the undisturbed run."""

import json
import shutil
from pathlib import Path

import pytest
from support.killed import kill_after_save
from support.programs import TINY, losses, run, summary
from support.saved import flip_bit
from support.tiny import TinyCorpus

from stablelm.observe.sinks import last_records, read_metrics

STEPS = 8
BASE = (*TINY, f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9", "train.warmup_steps=2")
RAMP = ("train.global_batch_size={0: 12, 3: 24, 6: 36}", "train.micro_batch_size=6")
CHANGE = ("train.lr=1e-4", "train.weight_decay=0.5", "train.grad_clip=0.01", "train.z_loss=1e-3")
ALLOW = "run.allow=[train.lr,train.weight_decay,train.grad_clip,train.z_loss]"


def train(corpus: TinyCorpus, run_dir: Path, *extra: str, processes: int = 1, code: int = 0, resume: str = "auto"):
    line = [*BASE, *corpus.overrides(), *extra, f"run.dir={run_dir}", "--resume", resume]
    done = run("pretrain", *line, processes=processes)
    assert done.returncode == code, done.stderr
    return done


def kill(corpus: TinyCorpus, run_dir: Path, step: int, *extra: str, processes: int = 1) -> None:
    assert not kill_after_save([*BASE, *corpus.overrides(), *extra], run_dir, step, processes=processes)


def near(one: Path, other: Path) -> bool:
    expected, found = losses(one), losses(other)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    return max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-6


@pytest.fixture(scope="module")
def changed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that changed after step 4, in two attempts."""
    run_dir = tmp_path_factory.mktemp("changed") / "run"
    train(tiny_corpus, run_dir, "run.stop_after=4", code=75)
    done = train(tiny_corpus, run_dir, *CHANGE, ALLOW)
    assert (
        "changed after step 4: train.lr 0.0003 -> 0.0001, train.min_lr 3e-05 -> 1e-05, train.weight_decay"
        in done.stdout
    )
    return run_dir


@pytest.mark.slow
def test_a_ramp_is_killed_and_goes_on_in_any_world_size(tiny_corpus: TinyCorpus, tmp_path: Path):
    train(tiny_corpus, tmp_path / "whole", *RAMP)
    tokens = [record["tokens"] for record in last_records(tmp_path / "whole" / "metrics.jsonl").values()]
    assert tokens == [32 * n for n in (12, 24, 36, 60, 84, 108, 144, 180)]
    kill(tiny_corpus, tmp_path / "cut", 2, *RAMP)
    shutil.copytree(tmp_path / "cut", tmp_path / "same")
    train(tiny_corpus, tmp_path / "same", *RAMP)
    assert losses(tmp_path / "same") == losses(tmp_path / "whole")
    kill(tiny_corpus, tmp_path / "cut", 4, *RAMP, "engine.kind=fsdp2", processes=2)
    train(tiny_corpus, tmp_path / "cut", *RAMP, "engine.kind=zero3", "data.workers=0", processes=2)
    assert near(tmp_path / "whole", tmp_path / "cut")
    assert summary(tmp_path / "cut")["tokens"] == tokens[-1]


def test_a_change_is_part_of_the_run_from_its_step_on(tiny_corpus: TinyCorpus, changed: Path):
    records = last_records(changed / "metrics.jsonl")
    rates = {step: record["lr"] for step, record in records.items()}
    assert rates[4] == pytest.approx(3e-4 * (0.1 + 0.9 * 0.75))  # half a cosine from step 2 to 8
    assert rates[8] == pytest.approx(1e-5)
    (event,) = (record for record in read_metrics(changed / "metrics.jsonl") if "changes" in record)
    assert (event["step"], event["attempt"], event["changes"]["train.lr"]) == (4, 2, [3e-4, 1e-4])
    identity = json.loads((changed / "identity.json").read_text())
    (segment,) = identity["run.segments"]
    assert segment == {"step": 4, "keys": event["changes"]}
    assert set(segment["keys"]) == {"train.lr", "train.min_lr", *(name.partition("=")[0] for name in CHANGE)}
    saved = json.loads((changed / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert saved["identity"] == identity
    again = train(tiny_corpus, changed, *CHANGE)
    assert "nothing to do" in again.stdout, "the change is not asked for twice"


@pytest.mark.slow
def test_a_changed_run_is_killed_and_goes_on_in_any_world_size(tiny_corpus: TinyCorpus, changed: Path, tmp_path: Path):
    kill(tiny_corpus, tmp_path / "cut", 4)
    kill(tiny_corpus, tmp_path / "cut", 6, *CHANGE, ALLOW)
    shutil.copytree(tmp_path / "cut", tmp_path / "same")
    train(tiny_corpus, tmp_path / "same", *CHANGE, ALLOW)  # as a job that is queued again
    assert losses(tmp_path / "same") == losses(changed)
    identities = [(run_dir / "identity.json").read_text() for run_dir in (tmp_path / "same", changed)]
    assert identities[0] == identities[1]
    train(tiny_corpus, tmp_path / "cut", *CHANGE, "engine.kind=zero2", processes=2)
    assert near(changed, tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("single", 1), ("zero1", 2)])
def test_a_checkpoint_from_before_the_change_goes_through_it_again(
    tiny_corpus: TinyCorpus, changed: Path, tmp_path: Path, engine: str, processes: int
):
    """Steps 3 and 4 have the former settings, whichever checkpoint survives."""
    run_dir = tmp_path / "run"
    shutil.copytree(changed, run_dir)
    for step in (4, 6, 8):
        (tensors,) = (run_dir / "checkpoints" / f"step-{step:08d}" / "tensors").glob("*.safetensors")
        flip_bit(tensors, 4000)
    done = train(tiny_corpus, run_dir, *CHANGE, f"engine.kind={engine}", processes=processes)
    assert "step-00000002" in done.stdout
    assert losses(run_dir) == losses(changed) if engine == "single" else near(changed, run_dir)


def test_what_is_not_allowed_is_named_with_what_would(tiny_corpus: TinyCorpus, changed: Path, tmp_path: Path):
    other = ("train.lr=1e-5", *CHANGE[1:])
    told = train(tiny_corpus, changed, *other, code=78).stderr
    assert "set them back or name another run.dir, or give later steps the new values by run.allow=[train.lr," in told
    assert "train.lr: saved with 0.0001, now 1e-05" in told
    told = train(tiny_corpus, changed, *other, "model.n_layers=4", "run.allow=[train.lr]", code=78).stderr
    assert "model.n_layers: saved with 3, now 4" in told
    assert "train.lr: " not in told
    assert "run.allow=" not in told
    older = str(changed / "checkpoints" / "step-00000006")
    told = train(tiny_corpus, changed, *other, "run.allow=[train.lr]", code=78, resume=older).stderr
    assert "step-00000008 is of a later step than the checkpoint from which the run would change" in told


@pytest.mark.slow
def test_a_branch_of_a_run_begins_at_any_checkpoint_in_its_own_directory(
    tiny_corpus: TinyCorpus, changed: Path, tmp_path: Path
):
    older = str(changed / "checkpoints" / "step-00000006")
    train(tiny_corpus, tmp_path / "branch", "run.allow=[train.lr]", "train.lr=1e-3", *CHANGE[1:], resume=older)
    segments = json.loads((tmp_path / "branch" / "identity.json").read_text())["run.segments"]
    assert [segment["step"] for segment in segments] == [4, 6]
    assert segments[1]["keys"] == {"train.lr": [1e-4, 1e-3], "train.min_lr": [1e-5, 1e-4]}


@pytest.mark.slow
def test_a_larger_batch_and_a_longer_run_from_a_checkpoint_on(tiny_corpus: TinyCorpus, tmp_path: Path):
    run_dir = tmp_path / "run"
    train(tiny_corpus, run_dir, "run.stop_after=4", code=75)
    allow = "run.allow=[train.global_batch_size,train.steps]"
    told = train(tiny_corpus, run_dir, allow, "train.global_batch_size={0: 12, 2: 24}", code=78).stderr
    assert (
        "train.global_batch_size={0: 12, 2: 24} changes the 4 batches that are trained; keep their sizes and change "
        "later ones, as {0: 12, 4: 24}" in told
    )
    told = train(tiny_corpus, run_dir, allow, "train.steps=3", code=78).stderr
    assert "train.steps=3 is below the 4 steps that are finished; raise it" in told
    ramp = ("train.global_batch_size={0: 12, 4: 24}", "train.steps=10")
    train(tiny_corpus, run_dir, allow, *ramp, "run.stop_after=6", code=75)
    train(tiny_corpus, run_dir, *ramp, processes=2)
    assert summary(run_dir)["tokens"] == 32 * (4 * 12 + 6 * 24)


@pytest.mark.slow
def test_a_rewind_to_before_a_change_has_the_former_rate_and_the_ramp_of_the_data(
    tiny_corpus: TinyCorpus, tmp_path: Path
):
    spike = ("faults.allow=true", "faults.bad_batch=8", "faults.spike=50")
    guards = ("guards.spike=rewind", "guards.window=2", "guards.threshold=20", "guards.skip_data=10")
    settings = (*guards, "train.global_batch_size={0: 12, 4: 24, 13: 36}", "train.steps=9", "train.schedule=constant")
    train(tiny_corpus, tmp_path, *settings, "run.stop_after=4", code=75)
    done = train(tiny_corpus, tmp_path, *settings, *spike, "train.lr=1e-4", "run.allow=[train.lr]")
    assert "back to step 2; batches 3 to 12 are skipped" in done.stdout
    records = last_records(tmp_path / "metrics.jsonl")
    assert [records[step]["lr"] for step in range(2, 10)] == [3e-4] * 3 + [1e-4] * 5
    assert summary(tmp_path)["tokens"] == 32 * (2 * 12 + 24 + 6 * 36)
    state = json.loads((tmp_path / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert (state["data"]["data_step"], state["guards"]["jumps"]) == (19, [[2, 10]])
