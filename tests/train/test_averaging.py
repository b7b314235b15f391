"""`evaluate.average`: a run scores what `eval` scores of its checkpoint, and training does not notice."""

import json
from pathlib import Path

import pytest
import torch
from engine.matrix import configuration, make_ranks, run_steps
from support.programs import TINY, run
from support.tiny import TinyCorpus

from stablelm.engine.interface import build_engine
from stablelm.observe.sinks import last_records
from stablelm.train.averaging import evaluated_weights

ALONE = make_ranks(0, 1)
SMALL = ("model.n_layers=1", "model.d_model=16", "model.n_heads=2", "train.lr=1e-2", "train.warmup_steps=0")
CASES = {
    "ema": ("train.ema=0.5",),
    "schedule_free": ("train.optimizer=schedule_free", "train.schedule=constant"),
    "none": ("train.ema=0.5", "evaluate.average=none"),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_inside_and_after(name: str):
    config = configuration(*SMALL, *CASES[name])
    engine = build_engine(config, "single", ALONE)
    run_steps(engine, ALONE, config, 1, 3)
    before = {key: tensor.clone() for key, tensor in engine.tensors().items()}
    y = before["model.head.weight"]
    with evaluated_weights(engine, ALONE, config, list):
        inside = engine.whole("head.weight")
    if name == "ema":
        assert torch.equal(inside, before["optim.head.weight.ema"])
    elif name == "schedule_free":
        assert torch.allclose(0.9 * inside + 0.1 * before["optim.head.weight.z"], y, atol=1e-7)
        assert not torch.equal(inside, y)
    else:
        assert torch.equal(inside, y)
    assert [key for key, tensor in engine.tensors().items() if not torch.equal(tensor, before[key])] == []


def test_every_engine_averages_and_goes_on_alike(tiny_corpus: TinyCorpus, tmp_path: Path):
    """Of shared layers, of which the last ones take fewer places: fsdp2 gathers ahead what no place needs."""
    common = (*TINY, *tiny_corpus.overrides(), "model.method=looped", "model.n_layers=3", "train.global_batch_size=4")
    often = ("train.ema=0.5", "train.steps=4", "evaluate.every=2", "train.lr=1e-2", "train.warmup_steps=0")
    found = {}
    for kind, processes in (("single", 1), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)):
        folder = tmp_path / kind
        done = run("pretrain", *common, *often, f"engine.kind={kind}", f"run.dir={folder}", processes=processes)
        assert done.returncode == 0, done.stderr
        records = last_records(folder / "metrics.jsonl")
        found[kind] = [records[step][name] for step in (2, 4) for name in ("loss", "val_loss/default")]
        assert len(set(found[kind])) == 4
        assert found[kind] == pytest.approx(found["single"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (("train.ema=0.5",), 1),
        (("train.ema=0.5", "engine.kind=zero3"), 2),
        (("train.optimizer=schedule_free", "train.schedule=constant"), 1),
        (("train.optimizer=schedule_free", "train.schedule=constant", "engine.kind=fsdp2"), 2),
        (("evaluate.average=last:2", "checkpoint.keep=2"), 1),
        (("evaluate.average=last:2", "checkpoint.keep=2", "engine.kind=fsdp2"), 2),
    ],
)
def test_a_run_scores_what_eval_scores(
    options: tuple[str, ...], processes: int, tiny_corpus: TinyCorpus, tmp_path: Path
):
    common = (*TINY, *tiny_corpus.overrides(), "train.steps=4", "train.lr=1e-2", "train.warmup_steps=0")
    often = ("checkpoint.every=1", "evaluate.every=2", *options)
    done = run("pretrain", *common, *often, f"run.dir={tmp_path / 'run'}", processes=processes)
    assert done.returncode == 0, done.stderr
    never = ("checkpoint.every=1", "evaluate.every=0", *options)
    done = run("pretrain", *common, *never, f"run.dir={tmp_path / 'other'}", processes=processes)
    assert done.returncode == 0, done.stderr
    records, others = (last_records(tmp_path / name / "metrics.jsonl") for name in ("run", "other"))
    assert [records[step].get("loss") for step in records] == [others[step].get("loss") for step in others]
    found = {}
    for average in ((), ("--average", "none")):
        out = tmp_path / f"{len(average)}.json"
        done = run("eval", "--checkpoint", str(tmp_path / "run"), *average, "--out", str(out))
        assert done.returncode == 0, done.stderr
        found[average] = json.loads(out.read_text())["sets"]["default"]["loss"]
    assert found[()] == pytest.approx(records[4]["val_loss/default"], rel=1e-6)
    assert (found[()] == found["--average", "none"]) == ("train.schedule=constant" in options)
