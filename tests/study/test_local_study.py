"""A study on this machine, from its file to its report; killed, stopped, changed, and with runs that fail."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import command, environment, run
from support.studies import BASE, write_study
from support.tiny import TinyCorpus

from stablelm.study.results import read_results

RATES = {"fixed": [4e-3, 1.6e-2]}
SMALL: dict[str, Any] = {
    "grid": {"model.method": ["pre_ln", "deepnorm", "rezero"], "depth": [2]},
    "lr": RATES,
    "seeds": {"tune": [0], "confirm": [1, 2]},
    "limits": {"jobs": 2},
}
SAME = ("ranking.csv", "cells.csv", "rates.csv", "layers.csv")


def study(action: str, file: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("study", action, "--study", str(file), *arguments, cwd=file.parent, **{"timeout": 290, **options})


def tables(folder: Path) -> dict[str, str]:
    """What does not depend on seconds."""
    return {name: (folder / "report" / "tables" / name).read_text() for name in SAME}


def report(file: Path) -> dict[str, str]:
    done = study("report", file, "--out", str(file.parent / "report"))
    assert done.returncode == 0, done.stderr
    return tables(file.parent)


def test_twelve_runs_and_a_report(tiny_corpus: TinyCorpus, tmp_path: Path):
    file = write_study(tmp_path, tiny_corpus, **SMALL)
    listed = study("expand", file)
    assert "3 cells, 12 to 12 runs" in listed.stdout, listed.stderr
    assert not (tmp_path / "runs").exists()
    done = study("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(tmp_path / "results")
    assert len(found) == 12 and {each["seed"] for each in found.values()} == {0, 1, 2}
    for each in found.values():
        assert each["val_loss"] is not None and each["provenance"]["commit"] and len(each["curve"]) == each["steps"]
        assert (each["layers"] is None) == (each["seed"] == 0)
        if each["layers"]:
            assert len(each["layers"]["windows"]) == 8 and set(each["layers"]["layer_rises"]) == {"0", "1"}
            mean = sum(each["layers"]["windows"]) / 8
            assert mean == pytest.approx(each["val_loss"], abs=1e-3)
            start = each["layers"]["start"]
            assert all(len(column) == 3 for column in start.values())
            assert start["stream_variance"] == pytest.approx(start["predicted_stream_variance"], rel=0.4)
    assert not list((tmp_path / "runs").rglob("step-*"))
    again = study("run", file)
    assert (again.returncode, again.stdout) == (0, "")
    assert "3 of 3 cells are done; 12 runs have results" in study("status", file).stdout
    first = report(file)
    assert len(list(csv.reader(first["ranking.csv"].splitlines()))) == 4
    assert "not finite" not in "".join(first.values())
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "http" not in page.split("</style>")[1]


def test_what_a_changed_grid_adds_and_leaves(tiny_corpus: TinyCorpus, tmp_path: Path):
    small = SMALL | {"grid": {"model.method": ["pre_ln"], "depth": [2]}, "seeds": {"tune": [0], "confirm": []}}
    file = write_study(tmp_path, tiny_corpus, **small)
    assert study("run", file).returncode == 0
    before = read_results(tmp_path / "results")
    write_study(tmp_path, tiny_corpus, **small | {"grid": {"model.method": ["pre_ln", "rezero"], "depth": [2]}})
    assert study("run", file).returncode == 0
    after = read_results(tmp_path / "results")
    assert len(before) == 2 and len(after) == 4 and after.items() >= before.items()
    write_study(tmp_path, tiny_corpus, **small | {"grid": {"model.method": ["rezero"], "depth": [2]}})
    assert study("report", file, "--out", str(tmp_path / "report")).returncode == 0
    assert "Results of no cell" in (tmp_path / "report" / "report.html").read_text()


def test_mistakes_create_nothing(tiny_corpus: TinyCorpus, tmp_path: Path):
    file = write_study(tmp_path, tiny_corpus, budget={"tokens": 10**9})
    for action in ("expand", "run", "status", "report", "submit"):
        done = study(action, file)
        assert done.returncode == 78 and "the text holds fewer" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()
    assert study("run", file, "--jobs", "0").returncode == 78
    assert "did you mean expand" in run("study", "expan", "--study", str(file)).stderr


def test_a_run_that_fails_is_named_and_others_go_on(tiny_corpus: TinyCorpus, tmp_path: Path):
    small = SMALL | {"grid": {"model.method": ["pre_ln"], "depth": [2]}, "seeds": {"tune": [0], "confirm": []}}
    file = write_study(tmp_path, tiny_corpus, **small)
    base = BASE | {
        "faults": {"allow": True, "crash": [0, 2]},
        "data": yaml.safe_load((tmp_path / "base.yaml").read_text())["data"],
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    done = study("run", file)
    assert done.returncode == 1 and done.stdout.count("failed: pre_ln depth=2") == 2, done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
    assert study("run", file).returncode == 0  # the fault is of the first attempt alone
    assert len(read_results(tmp_path / "results")) == 2


@pytest.mark.slow
def test_a_study_killed_three_times_gives_the_same_tables(tiny_corpus: TinyCorpus, tmp_path: Path):
    changes = SMALL | {"grid": {"model.method": ["pre_ln", "deepnorm"], "depth": [2]}, "budget": {"tokens": 4096}}
    changes["lr"] = {"start": [4e-3, 1.6e-2], "max_runs": 4, "bounds": [1e-4, 0.3]}
    folders = [tmp_path / "calm", tmp_path / "killed"]
    files = []
    for folder in folders:
        folder.mkdir()
        files.append(write_study(folder, tiny_corpus, **changes))
    assert study("run", files[0], timeout=600).returncode == 0
    draw = random.Random(0)
    for number in range(3):
        process = started(files[1])
        time.sleep(draw.uniform(6, 14))
        (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        free(files[1])
    done = study("run", files[1], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(files[0]) == report(files[1])


def started(file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("study", "run", "--study", str(file)), cwd=file.parent, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def free(file: Path) -> None:
    """Waits until no orphan holds the study."""
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
    lock = next((file.parent / "runs" / "studies").glob("*/lock"), None)
    if lock is not None:
        subprocess.run([sys.executable, "-c", script, str(lock)], check=True, timeout=120)


@pytest.mark.slow
def test_a_stop_is_told_and_goes_on(tiny_corpus: TinyCorpus, tmp_path: Path):
    long = {"tokens": 65536, "max_epochs": 99}
    file = write_study(tmp_path, tiny_corpus, **SMALL | {"budget": long, "limits": {"jobs": 1}})
    process = subprocess.Popen(
        command("study", "run", "--study", str(file)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("runs/studies/tiny/runs/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    refused = study("run", file)
    assert refused.returncode == 78 and "is in use by another start" in refused.stderr
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by a signal; the same command continues" in out
    (summary,) = tmp_path.glob("runs/studies/tiny/runs/*/summary.json")
    assert json.loads(summary.read_text())["exit_code"] == 75
    limited = study("run", file, "--hours", "0.002")
    assert limited.returncode == 75 and "stopped by limits.hours=0.002" in limited.stdout
