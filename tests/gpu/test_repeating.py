"""The same steps twice give the same bits; a run that is stopped and resumed is the run that was not."""

import json
from pathlib import Path

import pytest
from gpu_report import GpuReport
from support.tiny import TinyCorpus

import stablelm

STEPS, STOP = 6, 3


def trained(corpus: TinyCorpus, folder: Path, *overrides: str) -> list[dict]:
    """The records of a run of steps, in order of step."""
    settings = [
        *("model.method=deepscalelm_sigma", "model.n_layers=4", "model.d_model=64", "model.n_heads=1"),
        *("data.seq_len=32", "data.lanes=4", f"train.steps={STEPS}", "train.global_batch_size=4"),
        *("train.warmup_steps=1", "train.precision=bf16", "observe.every=1", "evaluate.every=0", "evaluate.batches=1"),
        *("checkpoint.every=2", "checkpoint.async=true", "train.deterministic=true", f"run.dir={folder}"),
    ]
    stablelm.train(stablelm.load_config(overrides=[*settings, *corpus.overrides(), *overrides]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_twice_and_resumed(tiny_corpus: TinyCorpus, tmp_path: Path, report: GpuReport):
    first, second = (trained(tiny_corpus, tmp_path / name) for name in ("first", "second"))
    assert [r["step"] for r in first] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    trained(tiny_corpus, tmp_path / "resumed", f"run.stop_after={STOP}")
    resumed = trained(tiny_corpus, tmp_path / "resumed")
    assert [r["step"] for r in resumed] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in first]
    report.add("Repeating", "loss of the last step", first=first[-1]["loss"], again=second[-1]["loss"],
               resumed=resumed[-1]["loss"])  # fmt: skip
    kept = sorted(path.name for path in (tmp_path / "resumed" / "checkpoints").glob("step-*"))
    assert f"step-{STEPS:08d}" in kept
