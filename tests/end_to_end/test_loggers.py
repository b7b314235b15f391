"""W&B, MLflow and Trackio hold what metrics.jsonl holds, each step once, over a crash; bad input is one line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import TINY, environment, run
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.observe.sinks import last_records, read_metrics

NAMES = ("wandb", "mlflow", "trackio")
MISSING = [name for name in NAMES if importlib.util.find_spec(name) is None]
needs_all = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SMALL = (*TINY, "train.steps=7", "model.n_layers=2", "observe.layers_every=2", "evaluate.every=3", "evaluate.batches=1")


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    for variable in [variable for variable in os.environ if variable.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)


def read_back(run_dir: Path) -> dict:
    # -P: a file of tests/support has the name of a module of Python.
    script = [sys.executable, "-P", str(REPOSITORY / "tests" / "support" / "read_loggers.py"), str(run_dir)]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def first_figures(run_dir: Path) -> dict[tuple[int, str], float]:
    """Every number of metrics.jsonl by step and name, as it was written first."""
    found: dict[tuple[int, str], float] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "tokens", "attempt"):
                found.setdefault((record["step"], name), value)
    return found


def points(found: dict) -> dict[tuple[int, str], list[float]]:
    by_name: dict[tuple[int, str], list[float]] = {}
    for step, name, value in found["points"]:
        if name not in ("step", "tokens", "attempt"):
            by_name.setdefault((step, name), []).append(value)
    return by_name


@needs_all
@pytest.mark.slow
def test_they_hold_the_same_figures_over_a_crash_and_a_resume(tiny_corpus: TinyCorpus, tmp_path: Path):
    run_dir = tmp_path / "deep"
    crash = ("faults.allow=true", "faults.crash=[0,6]", "checkpoint.every=3")
    line = (*SMALL, *tiny_corpus.overrides(), f"run.dir={run_dir}", "observe.sinks=[wandb,mlflow,trackio]", *crash)
    secret = "hf_" + "s3cr3t" * 5
    first = run("pretrain", *line, launcher="python", HF_TOKEN=secret, WANDB_MODE="offline")
    assert (first.returncode, first.stdout.count("step 5/7")) == (1, 1), first.stderr
    second = run("pretrain", *line, launcher="python", HF_TOKEN=secret, WANDB_MODE="offline")
    assert second.returncode == 0, second.stderr
    assert "warning" not in second.stdout + second.stderr
    assert "resumed from" in second.stdout
    expected, found = first_figures(run_dir), read_back(run_dir)
    for name in NAMES:
        held = points(found[name])
        assert {key for key, values in held.items() if len(values) != 1} == set(), name
        assert {key: values[0] for key, values in held.items()} == expected, name
    for step, record in last_records(run_dir / "metrics.jsonl").items():
        assert expected[step, "loss"] == record["loss"]
    check_facts(found, read_metrics(run_dir / "metrics.jsonl"))
    assert secret not in json.dumps(found)
    assert not (run_dir / "tensorboard").exists()


def check_facts(found: dict, records: list[dict]) -> None:
    """One run each, with its name, method and depth, configuration and commit."""
    rows, runs = found["wandb"]["rows"], found["wandb"]["runs"]
    assert sorted(set(rows)) == rows and len(rows) <= len(records)
    assert len({run_id for run_id, *_ in runs}) == 1 and len(runs) == 2
    _, name, tags, config = runs[0]
    assert (name, tags, config["model.n_layers"]) == ("deep", ["pre_ln", "2 layers"], 2)
    assert config["provenance"]["world_size"] == 1
    ((status, name, tags, params),) = found["mlflow"]["runs"]
    assert (status, name, tags["method"], tags["depth"]) == ("FINISHED", "deep", "pre_ln", "2 layers")
    assert params["train.steps"] == "7" and "torch " in tags["versions"]
    ((name, config),) = found["trackio"]["runs"]
    assert (name, config["model.d_model"], config["tags"]) == ("deep", 32, ["pre_ln", "2 layers"])


@needs_all
@pytest.mark.slow
def test_a_logger_added_later_gets_what_was_before(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = (*SMALL, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'deep'}")
    first = run("pretrain", *line, "run.stop_after=4", "observe.sinks=[]", launcher="python", WANDB_MODE="offline")
    assert first.returncode == 75, first.stderr
    assert "curves:" not in first.stdout
    second = run("pretrain", *line, "observe.sinks=[wandb,mlflow,trackio]", launcher="python", WANDB_MODE="offline")
    assert second.returncode == 0, second.stderr
    expected, found = first_figures(tmp_path / "deep"), read_back(tmp_path / "deep")
    for name in NAMES:
        assert points(found[name]) == {key: [value] for key, value in expected.items()}, name


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_is_bad_input(name: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    line = (*SMALL, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", f"observe.sinks=[{name}]")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        f"u.find_spec = lambda name, package=None: None if name == {name!r} else find(name, package)\n"
    )
    path = f"{tmp_path}:{REPOSITORY}"
    done = run("pretrain", *line, launcher="python", PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (
        78,
        f'error: observe.sinks: {name} is not installed; pip install "stablelm[{name}]", or take {name} out of '
        "observe.sinks\n",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("wandb" in MISSING, reason="wandb is not installed")
def test_wandb_without_a_login_is_bad_input(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = (*SMALL, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "observe.sinks=[wandb]")
    done = run("pretrain", *line, launcher="python", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode == 78
    assert "observe.sinks: wandb is not logged in; run wandb login, set WANDB_API_KEY, or set WANDB_MODE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("mlflow" in MISSING, reason="mlflow is not installed")
def test_an_mlflow_server_that_does_not_answer_is_bad_input(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = (*SMALL, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "observe.sinks=[mlflow]")
    nowhere = "http://user:passw0rd@127.0.0.1:9"
    done = run("pretrain", *line, launcher="python", MLFLOW_TRACKING_URI=nowhere)
    assert done.returncode == 78
    assert "observe.sinks: mlflow gets no answer from http://***@127.0.0.1:9; start the server" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_logger_of_another_name_is_bad_input(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "observe.sinks=[wandbb]")
    assert done.returncode == 78
    assert "observe.sinks=[wandbb] must be a list of tensorboard, wandb, mlflow or trackio" in done.stderr
