"""docs/performance.md: its tables are what its script makes, and say what was not measured."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from support.pages import DOCS

from docs.filled_tables import filled

PAGE = DOCS / "performance.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "make_performance_page.py"))


@pytest.mark.slow
def test_the_page_is_as_its_script_makes_it(script: dict[str, Any]):
    assert filled(TEXT, script["TABLES"]) == TEXT


def test_the_gpu_figures_are_called_a_prediction():
    assert "**No GPU figure exists yet.**" in TEXT
    assert "**prediction, not a measurement**" in TEXT.partition("<!-- prediction -->")[0].rpartition("###")[2]


def test_measured_figures_fill_the_tables(script: dict[str, Any], tmp_path: Path):
    tables = script["TABLES"]
    tables["goals"].__globals__["MEASURED"] = tmp_path
    spread = {"median": 1.3, "low": 1.2, "high": 1.4}
    goal = {"what": "tokens/s: a / b", "shape": "12x384x4x512", **spread, "goal": 1.25, "at_least": True}
    (tmp_path / "goals.json").write_text(json.dumps([goal]))
    metrics = ("tokens_per_second", "peak_memory_bytes", "training_memory_bytes", "first_step_seconds", "flops_share")
    each = {"name": "stablelm-gpt2-compiled", "shape": "12x384x4x512", "unit": "", "median": 2e9, "low": 1, "high": 3}
    (tmp_path / "train-step.json").write_text(json.dumps([{**each, "metric": m} for m in (*metrics, "parameters")]))
    for when, shares in (("before", (0.5, 0.2)), ("after", (0.6, 0.1))):
        rows = [
            {"shape": shape, "mode": "eager", "operator": operator, "share": share, "milliseconds": 10, "calls": 3}
            for shape in ("12x384x4x512", "24x512x2x512")
            for operator, share in zip(("aten::mm", "aten::copy_"), shares, strict=True)
        ]
        (tmp_path / f"profile-{when}.json").write_text(json.dumps(rows))
    assert "| 1.30 | 1.20 to 1.40 | ≥ 1.25 | yes |" in tables["goals"]()
    assert "| stablelm-gpt2-compiled | 2,000,000,000 | 2.00 | 2.00 |" in tables["contestants"]()
    lines = tables["profiles"]().splitlines()
    assert lines[0] == "| shape | mode | operator | before | after |"
    assert lines[2] == "| 12x384x4x512 | eager | `aten::mm` | 50.0% (10 ms) | 60.0% (10 ms) |"
    assert [line.split()[1] for line in lines[2:]] == ["12x384x4x512"] * 2 + ["24x512x2x512"] * 2
