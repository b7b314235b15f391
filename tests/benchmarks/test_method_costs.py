"""What methods cost: ratios to pre_ln from made-up rounds, what may be asked, and one group that runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.samples import REPOSITORY

from benchmarks import method_costs
from stablelm.methods.catalogue import METHODS


def rounds_of(*rates: float, peak: float, parameters: int) -> list[dict[str, Any]]:
    fixed = {"peak_memory_bytes": peak, "import_memory_bytes": 1e9, "parameters": parameters}
    return [{"tokens_per_second": rate, **fixed} for rate in rates]


def test_ratios_are_of_the_same_round():
    measured = {
        "pre_ln": rounds_of(100, 200, 100, peak=3e9, parameters=10),
        "keel": rounds_of(50, 100, 40, peak=4e9, parameters=11),
    }
    found = {(each["name"], each["metric"]): each for each in method_costs.records_of(measured, "2x64x1x32")}
    assert found["keel", "step_ratio"]["median"] == 2 and found["keel", "step_ratio"]["high"] == 2.25
    assert found["keel", "training_memory_ratio"]["median"] == 1.5
    assert found["keel", "parameter_ratio"]["median"] == 1.1
    assert found["pre_ln", "step_ratio"]["high"] == 1


def test_what_may_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert method_costs.chosen(None) == [name for name in METHODS if name != "pre_ln"]
    assert method_costs.groups_of(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    assert method_costs.main(["--only=keal", f"--runs={tmp_path}/runs"]) == 1
    assert "--only keal is no method; docs/methods/index.md lists them" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_group_is_measured_once_and_a_refused_method_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["--shape=2x64x1x32", "--vocab=512", "--threads=1", "--eager", "--rounds=2"]
    asked = [*sizes, "--only=keel,catformer", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out.json"]
    assert method_costs.main(asked) == 0
    left_out = capsys.readouterr().err
    names = {each["name"] for each in json.loads((tmp_path / "out.json").read_text())}
    assert names | {line.split()[0] for line in left_out.splitlines()} == {"keel", "catformer"}
    kept = [file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")]
    assert method_costs.main(asked) == 0
    assert [file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")] == kept


@pytest.mark.parametrize("name", ["method_costs", "optimizers", "methods", "checkpoints", "data_faults"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(name, tmp_path):
    script = REPOSITORY / "benchmarks" / f"{name}.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "none" / "costs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "its folder does not exist; create it first" in done.stderr
