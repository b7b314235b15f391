"""Recording runs for the probe: what is appended, what is not made twice, and what a comparison gives."""

import json
import sys
from pathlib import Path

import pytest
from support.programs import run
from support.studies import write_study
from support.tiny import TinyCorpus

from benchmarks import trained
from stablelm.config.load import load
from stablelm.probe.run_records import read_records
from stablelm.probe.signals import Signals
from stablelm.study.results import read_results

PLAN = [{"method": "rezero", "n_layers": 2, "lrs": [1e-2, 1e-3], "steps": 3, "warmup": 1}]


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["trained.py", *map(str, arguments)])
    trained.main()


@pytest.mark.slow
def test_runs_are_appended_and_not_made_again(tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "records.jsonl"
    text = dict(item.split("=", 1) for item in tiny_corpus.overrides())
    given = ["--data", text["data.path"], "--tokenizer", text["data.tokenizer"]]
    given += ["--validation", text["data.validation_path"]] if "data.validation_path" in text else []
    plan.write_text(json.dumps(PLAN))
    start(monkeypatch, "run", *given, "--plan", plan, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["method"], row["lr"], row["steps"]) for row in rows] == [("rezero", 1e-2, 3), ("rezero", 1e-3, 3)]
    for row in rows:
        assert row["outcome"] == ("trained" if row["val_loss"] < row["unigram_loss"] - 0.1 else "failed")
        assert row["signals"]["sensitivity"] == 0
        assert row["signals"]["update_output_change"] > 0
        assert str(tmp_path) not in json.dumps(row)
    assert rows[0]["signals"]["update_output_change"] > rows[1]["signals"]["update_output_change"]
    assert len(read_records(out)) == 2
    start(monkeypatch, "run", *given, "--plan", plan, "--out", out)
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.slow
def test_runs_of_a_study_are_taken_over_once(tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch):
    grid = {"model.method": ["pre_ln"], "depth": [2], "model.tie_embeddings": [True]}
    file, out = write_study(tmp_path, tiny_corpus, grid=grid, lr={"fixed": [4e-3, 1.6e-2]}), tmp_path / "records.jsonl"
    done = run("study", "run", "--study", str(file), cwd=tmp_path, timeout=290)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, "import", "--study", file, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    results = list(read_results(tmp_path / "results").values())
    assert sorted((row["lr"], row["seed"], row["val_loss"]) for row in rows) == sorted(
        (result["lr"], result["seed"], round(result["val_loss"] or 0, 4)) for result in results
    )
    assert all(row["overrides"] == {"model.tie_embeddings": True} for row in rows)
    assert len({row["signals"]["update_output_change"] for row in rows}) == len(rows)
    assert len(read_records(out)) == len(rows) >= 2
    start(monkeypatch, "import", "--study", file, "--out", out)
    assert len(out.read_text().splitlines()) == len(rows)


def test_an_outcome():
    signals = Signals(*[float("inf"), *[0.123456789] * 8])
    found = trained.outcome(signals, 6.2, 4.9, 4.85, 5.0)
    assert (found["outcome"], found["signals"]["gradient_ratio"]) == ("trained", "inf")
    assert found["signals"]["token_cosine"] == 0.12346
    assert trained.outcome(signals, 6.2, 4.9, 4.95, 5.0)["outcome"] == "failed"
    assert trained.outcome(signals, 6.2, 4.9, float("nan"), 5.0)["outcome"] == "failed"


def test_the_plan_names_every_run_once():
    runs = list(trained.planned(json.loads(trained.PLAN.read_text())))
    keys = [json.dumps(key, sort_keys=True) for key, _ in runs]
    assert len(set(keys)) == len(keys) > 30
    for _, settings in runs:
        load([], [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def test_text_is_named_without_its_place():
    assert trained.text_name("/data/c4/en/c4-train.*.json.gz") == "c4-train"
    assert trained.text_name(["/a/b.json.gz", "/a/c.json.gz"]) == "b"
    assert trained.text_name("embedded") == "embedded"
