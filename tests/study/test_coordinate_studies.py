"""Studies of kind coordinates: from the file to the report, continued, changed, and with mistakes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.programs import run
from support.studies import write_study
from support.tiny import TinyCorpus

from stablelm.config.load import dump, load
from stablelm.errors import ConfigError
from stablelm.observe.provenance import REPOSITORY, git_state
from stablelm.probe.coordinates import FIGURES, STEPS
from stablelm.study.cells import cells_of
from stablelm.study.coordinates import measure, read_sizes
from stablelm.study.study_file import read_study

KIND: dict[str, Any] = {
    "kind": "coordinates",
    "grid": {"model.method": ["pre_ln", "completep"]},
    "shapes": {"rule": "list", "list": ["2x32", "4x32", "2x64", "4x64"], "d_head": 16},
    "budget": None,
    "lr": {"fixed": [4e-3]},
    "limits": {"jobs": 2},
}


def study(action: str, file: Path, *arguments: str):
    return run("study", action, "--study", str(file), *arguments, cwd=file.parent, timeout=290)


def test_from_file_to_report(tiny_corpus: TinyCorpus, tmp_path: Path):
    smaller = KIND | {"shapes": KIND["shapes"] | {"list": KIND["shapes"]["list"][:3]}}
    file = write_study(tmp_path, tiny_corpus, **smaller)
    assert "6 cells, 6 to 6 runs" in study("expand", file).stdout
    done = study("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    first = read_sizes(tmp_path / "results")
    assert len(first) == 6 and all(
        np.array(each["figures"]).shape == (STEPS + 1, len(FIGURES)) for each in first.values()
    )
    write_study(tmp_path, tiny_corpus, **KIND)  # a larger grid adds what is new
    assert "6 of 8 models are measured" in study("status", file).stdout
    assert study("run", file).returncode == 0
    found = read_sizes(tmp_path / "results")
    assert {name: found[name] for name in first} == first and len(found) == 8
    assert {each["provenance"]["commit"] for each in found.values()} == {git_state(REPOSITORY)[0]}
    shown = study("report", file, "--out", str(tmp_path / "report"))
    assert shown.returncode == 0, shown.stderr
    with open(tmp_path / "report" / "tables" / "slopes.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["in"], row["the other"]) for row in rows] == 2 * [
        ("depth", "32"), ("depth", "64"), ("width", "2"), ("width", "4")
    ]  # fmt: skip
    last = {(each["point"]["model.method"], each["shape"]["n_layers"], each["shape"]["d_model"]): each["figures"][-1]
            for each in found.values()}  # fmt: skip
    wanted = np.log2(np.array(last["pre_ln", 4, 64]) / np.array(last["pre_ln", 2, 64]))  # type: ignore[arg-type]
    assert float(rows[1]["stream"]) == pytest.approx(wanted[0], abs=0.006)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "8 of 8 models" in page and ("passes in" in page or "fails in" in page)
    assert {file.stem for file in (tmp_path / "report" / "figures").glob("*.svg")} == {"slopes", "steps-1", "steps-2"}


def test_a_model_is_measured_as_the_probe_measures_it(tiny_corpus: TinyCorpus, tmp_path: Path):
    cell = cells_of(read_study(str(write_study(tmp_path, tiny_corpus, **KIND))))[0]
    out = tmp_path / "probe"
    given = [f"model.{name}={getattr(cell.config.model, name)}" for name in ("method", "n_heads", "d_ff")]
    given += ["model.d_model=32", "train.lr=4e-3", "train.warmup_steps=0", "train.steps=10"]
    options = ["--coordinates", "depths=2,4", "--sequences", "4", "--seq-len", "32", "--out", str(out)]
    done = run("probe", "--config", str(tmp_path / "base.yaml"), *options, *given)
    assert done.returncode == 0, done.stderr
    wanted = json.loads((out / "coordinates.json").read_text())["axes"]["depth"]["figures"]
    base = load([str(tmp_path / "base.yaml")], [*given, "model.n_layers=2", f"run.dir={tmp_path / 'run'}"]).config
    (tmp_path / "one.yaml").write_text(dump(base))
    found = measure(str(tmp_path / "one.yaml"))["figures"]
    for index, name in enumerate(FIGURES):
        assert [row[index] for row in found] == pytest.approx(wanted[name][0], rel=1e-5)


MISTAKES = {
    "a search": ({"lr": {"start": [1e-3]}}, "give lr.fixed: [RATE]"),
    "two rates": ({"lr": {"fixed": [1e-3, 2e-3]}}, "give lr.fixed: [RATE]"),
    "a budget": ({"budget": {"tokens": 512}}, "budget.tokens: kind=coordinates makes ten steps; leave budget out"),
    "a warm-up": ({"grid": {"model.method": ["pre_ln"], "warmup_fraction": [0.1]}}, "at a constant rate"),
    "GPUs": ({"resources": {"gpu": "h100"}}, "at a constant rate on CPUs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    changes, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("]", r"\]")):
        read_study(str(write_study(tmp_path, tiny_corpus, **KIND | changes)))


def test_results_of_another_kind(tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{'a' * 16}.json").write_text("{}")
    file = write_study(tmp_path, tiny_corpus, **KIND)
    for action in ("status", "run", "report"):
        done = study(action, file)
        assert done.returncode == 78 and "delete it, and the run is made again" in done.stderr
    assert study("submit", file).returncode == 78
