"""The report of `make test-gpu`: one JSON file and one page."""

import json
from pathlib import Path

import pytest
from gpu_report import GpuReport


def test_json_and_page(tmp_path: Path):
    report = GpuReport()
    report.add("Speed", "pre_ln eager", tokens_per_second=12345.6, mfu=0.41234, planned_mfu=None)
    report.add("Speed", "pre_ln compiled", tokens_per_second=23456.0, mfu=0.5)
    passed = pytest.TestReport("a.py::test_a", ("a.py", 1, ""), {}, "passed", None, "call", duration=1.234)
    left_out = pytest.TestReport(
        "a.py::test_b", ("a.py", 2, ""), {}, "skipped", ("a.py", 2, "Skipped: no | GPU"), "setup"
    )
    report.finished(passed)
    report.finished(left_out)
    report.write(tmp_path / "new")
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [test["outcome"] for test in found["tests"]] == ["passed", "skipped"]
    assert found["figures"][0] == {
        "section": "Speed",
        "name": "pre_ln eager",
        "tokens_per_second": 12345.6,
        "mfu": 0.41234,
        "planned_mfu": None,
    }
    assert {"python", "torch", "gpu"} <= set(found["machine"])
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert "| pre_ln eager | 12,346 | 0.4123 |  |" in page
    assert "Skipped: no \\| GPU" in page
