"""The trainability comparison: its figures from made-up runs, the order of its runs, and a small real one."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import environment
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from benchmarks import trainability
from benchmarks.trainability_report import Run, best_lr, name_of, row_of, rows_of, smoothed, table, write_report
from stablelm.errors import ConfigError

SETTINGS = {
    "model.n_layers": 96,
    "model.d_model": 64,
    "model.activation": "gelu",
    "model.attention.position": "rope",
    "data.seq_len": 32,
    "train.global_batch_size": 8,
    "train.steps": 30,
    "train.warmup_steps": 3,
    "train.schedule": "cosine",
    "train.grad_clip": 1.0,
}


def run(method: str = "pre_ln", lr: float = 1e-3, seed: int = 0, val: float = 5.0, **changes: Any) -> Run:
    """30 steps: from 8 to 6 nats, the last 20 all at 6; gradient norms 100 in the warm-up, then 1 but for one 4."""
    made: dict[str, Any] = {
        "warmup_steps": 3,
        "losses": [8.0] * 10 + [6.0] * 20,
        "grad_norms": [100.0] * 3 + [1.0] * 26 + [4.0],
        "unigram_loss": 6.5,
        **changes,
    }
    return Run(method=method, lr=lr, seed=seed, val_loss=val, **made)


def broken(**changes: Any) -> Run:
    return run(val=math.nan, losses=[8.0, 9.0, math.nan], grad_norms=[1.0, 2.0, math.inf], broke_off=True, **changes)


@pytest.mark.parametrize(
    ("made", "diverged"),
    [
        (run(), False),
        (run(losses=[8.0] * 30), True),
        (run(losses=[8.0] * 10 + [7.51] * 20), True),
        (run(losses=[8.0] * 10 + [7.49] * 20), False),
        (run(losses=[8.0] + [5.0] * 9 + [9.0] * 20), True),
        (run(val=math.inf), True),
        (broken(), True),
    ],
)
def test_what_counts_as_diverged(made: Run, diverged: bool):
    assert made.diverged is diverged


def test_a_run_in_figures():
    told = run(losses=[8.0] * 20 + [6.0] * 10).as_dict()
    assert told["first_loss"] == 8.0
    assert told["final_loss"] == 7.0  # of the last 20: half at 8, half at 6
    assert told["grad_norm_largest"] == 4.0  # the warm-up's 100 do not count
    assert told["grad_norm_median"] == 1.0


def test_steps_whose_update_was_left_out_do_not_count():
    skipped = run(losses=[8.0] * 10 + [6.0] * 19 + [math.nan], grad_norms=[100.0] * 3 + [math.nan] + [1.0] * 25 + [4.0])
    assert (skipped.final_loss, skipped.diverged) == (6.0, False)
    told, row = skipped.as_dict(), row_of([run(grad_norms=[math.nan] * 30), skipped])
    assert (told["grad_norm_largest"], told["grad_norm_median"]) == (4.0, 1.0)
    assert (row["grad_norm_largest"], row["grad_norm_median"]) == (4.0, 1.0)
    assert math.isnan(run(grad_norms=[math.nan] * 30).as_dict()["grad_norm_largest"])
    assert smoothed([6.0, math.nan, 6.0])[1] == [6.0] * 3


def test_row_of_a_method():
    rows = [run(lr=1e-3, val=5.2), run(lr=3e-3, val=5.0), run(lr=1e-2, val=5.9, losses=[8.0] * 30)]
    rows += [run(lr=3e-3, seed=1, val=5.3), run(lr=3e-3, seed=2, val=5.6, grad_norms=[1.0] * 20 + [7.0] * 10)]
    row = row_of(rows)
    assert row["best_lr"] == 3e-3
    assert row["val_loss_mean"] == pytest.approx(5.3)
    assert row["val_loss_std"] == pytest.approx(statistics.stdev([5.0, 5.3, 5.6]))
    assert row["seeds"] == 3
    assert row["val_loss_by_lr"] == {"0.001": 5.2, "0.003": 5.0, "0.01": 5.9}
    # The diverged rate counts as the first step's 8: ((5.2 - 5) + 0 + (8 - 5)) / 3.
    assert row["lr_sensitivity"] == pytest.approx(3.2 / 3)
    assert row["grad_norm_largest"] == 7.0
    assert (row["diverged"], row["runs"]) == (1, 5)


def test_other_seeds_do_not_choose_the_rate():
    assert row_of([run(lr=1e-3, val=5.0), run(lr=3e-3, val=5.1), run(lr=3e-3, seed=1, val=4.0)])["best_lr"] == 1e-3


def test_a_diverged_run_is_never_the_best():
    assert best_lr([run(lr=1e-3, val=6.0), run(lr=3e-3, val=4.0, losses=[8.0] * 30)]) == 1e-3


def test_nothing_trained():
    row = row_of([broken(lr=3e-3), broken(lr=1e-3)])
    assert (row["best_lr"], row["lr_sensitivity"], row["diverged"]) == (1e-3, None, 2)
    assert "| — |" in table([row], SETTINGS, 6.5)


def test_table_is_sorted_and_marks_what_diverged():
    runs = [
        run("magneto", val=4.8),
        run("pre_ln", lr=1e-3, val=5.0),
        run("pre_ln", lr=1e-2, val=7.9, losses=[8.0] * 30),
    ]
    text = table(rows_of([*runs, broken(method="post_ln")]), SETTINGS, 6.5)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in lines[2:]] == ["magneto", "pre_ln", "post_ln"]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == "| pre_ln | 0.001 | 5.000 (1) | 5.000 | 7.900 × | 1.500 | 4.00 (1.00) | 1/2 |"
    assert "activation gelu" in text
    assert "6.500" in text


def test_report_files(tmp_path: Path):
    runs = [run(), run(lr=3e-3, val=5.5), broken(lr=1e-2), run("magneto_sigma"), run("peri_ln"), run(seed=1, val=5.1)]
    write_report(runs, SETTINGS, tmp_path)
    told = json.loads((tmp_path / "trainability.json").read_text())
    assert {row["method"] for row in told["methods"]} == {"pre_ln", "magneto_sigma", "peri_ln"}
    assert len(told["runs"]) == 6
    assert told["runs"][2]["val_loss"] is None
    assert told["settings"] == SETTINGS
    assert (tmp_path / "trainability.md").read_text().count("\n| ") >= 4
    assert (tmp_path / "trainability.png").read_bytes().startswith(b"\x89PNG")


def test_no_report_before_a_run_has_finished(tmp_path: Path):
    write_report([], SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_running_mean():
    assert smoothed([4.0, 2.0]) == ([1, 2], [4.0, 3.0])
    assert smoothed([1.0] * 5 + [3.0] * 10)[1][-1] == 3.0


def options(folder: Path, *more: str) -> argparse.Namespace:
    return trainability.parse_arguments([f"--runs={folder}/runs", f"--out={folder}/out", *more])


PRETENDED = """
import json, sys
from pathlib import Path

keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
run, lr, own = Path(keys["run.dir"]), float(keys["train.lr"]), Path(__file__)
with own.with_suffix(".started").open("a") as started:
    print(run.name, file=started)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
model, train = {"method": keys["model.method"]}, {"lr": lr, "warmup_steps": 0}
(run / "config.yaml").write_text(json.dumps({"model": model, "train": train, "run": {"seed": int(keys["run.seed"])}}))
records = [json.dumps({"step": step, "loss": 8.0 - step, "grad_norm": 1.0}) for step in range(3)]
(run / "metrics.jsonl").write_text("\\n".join(records) + "\\n")
code = json.loads(own.with_suffix(".json").read_text()).get(run.name, 0)
summary = {"exit_code": code, "val_loss": {"default": abs(lr - 1e-2)}, "unigram_loss": {"default": 6.0}}
(run / "summary.json").write_text(json.dumps(summary))
sys.exit(code)
"""


def pretend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, codes: dict[str, int] | None = None
) -> tuple[Path, list[int]]:
    """Runs end at once, better the nearer their rate is to 1e-2; the file of names as they start, sizes of reports."""
    program, reports = folder / "pretend.py", []
    program.write_text(PRETENDED)
    program.with_suffix(".json").write_text(json.dumps(codes or {}))
    monkeypatch.setattr(trainability, "PRETRAIN", program)
    monkeypatch.setattr(trainability, "write_report", lambda runs, settings, out: reports.append(len(runs)))
    started = program.with_suffix(".started")
    started.write_text("")
    return started, reports


def work(folder: Path) -> int:
    chosen = options(folder, "--methods=pre_ln,magneto", "--lrs=3e-3,1e-3,1e-2")
    return trainability.work(chosen, trainability.settings_of(chosen))


def test_order_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started, reports = pretend(monkeypatch, tmp_path)
    assert work(tmp_path) == 0
    assert reports == [2, 4, 6, 8, 10]
    first = [name_of(method, lr, 0) for lr in (3e-3, 1e-3, 1e-2) for method in ("pre_ln", "magneto")]
    assert started.read_text().split() == first + [
        name_of(method, 1e-2, seed) for seed in (1, 2) for method in ("pre_ln", "magneto")
    ]
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
    started.write_text("")
    assert work(tmp_path) == 0
    assert started.read_text().split() == []


def test_a_failed_run_is_named_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    name = name_of("pre_ln", 1e-3, 0)
    pretend(monkeypatch, tmp_path, {name: 1, name_of("magneto", 1e-3, 0): 76})
    assert work(tmp_path) == 1
    assert f"failed: {name}\n" in capsys.readouterr().err
    started, _ = pretend(monkeypatch, tmp_path)
    assert work(tmp_path) == 0
    assert started.read_text().split() == [name, name_of("pre_ln", 1e-2, 1), name_of("pre_ln", 1e-2, 2)]


def test_a_folder_of_other_runs_is_refused(tmp_path: Path):
    os.close(trainability.claim(tmp_path, SETTINGS))
    with pytest.raises(ConfigError, match=r"other train\.steps; name another"):
        trainability.claim(tmp_path, {**SETTINGS, "train.steps": 31})


def test_one_driver_a_folder(tmp_path: Path):
    lock = trainability.claim(tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match="in use"):
        trainability.claim(tmp_path, SETTINGS)
    os.close(lock)
    os.close(trainability.claim(tmp_path, SETTINGS))


@pytest.mark.parametrize("arguments", [["--methods=pre_lm"], ["--report-only"]])
def test_mistakes_are_told_in_a_sentence(arguments: list[str], tmp_path: Path, capsys):
    assert trainability.main([f"--runs={tmp_path}/none", f"--out={tmp_path}/out", *arguments]) == 78
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_two_methods_from_text_to_table(tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = [f"--data={tiny_corpus.train}", f"--validation={tiny_corpus.validation}"]
    arguments += [f"--tokenizer={tiny_corpus.tokenizer}", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out"]
    arguments += ["--methods=pre_ln,deepscalelm_post", "--layers=4", "--d-model=32", "--steps=3", "--lrs=3e-3"]
    arguments += ["--seeds=1", "--eval-batches=2", "--jobs=2"]

    def start() -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(REPOSITORY / "benchmarks" / "trainability.py"), *arguments]
        return subprocess.run(
            program, env=environment(), capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False
        )

    done = start()
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "trainability.json").read_text())
    assert len(told["runs"]) == 2
    assert [row["seeds"] for row in told["methods"]] == [1, 1]
    for each in told["runs"]:
        assert each["steps"] == 3
        assert abs(each["first_loss"] - math.log(300)) < 1
        assert each["val_loss"] < each["first_loss"] + 0.1
    config = yaml.safe_load((tmp_path / "runs" / "deepscalelm_post-lr0.003-seed0" / "config.yaml").read_text())
    assert (config["model"]["activation"], config["run"]["seed"]) == ("gelu", 0)
    again = start()
    assert again.returncode == 0
    assert "0 runs made, 2 kept" in again.stdout
