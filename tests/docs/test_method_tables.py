"""The tables of measured methods and optimizers: made from results, and saying what is missing."""

import json
from pathlib import Path

import pytest

from docs import make_method_tables
from docs.filled_tables import filled


def test_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(make_method_tables, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(make_method_tables, "MEASURED", tmp_path / "docs" / "measured")
    assert "docs/measured/costs.json does not exist" in make_method_tables.method_costs()
    (tmp_path / "docs" / "measured").mkdir(parents=True)
    spread = {"median": 1.5, "low": 1.4, "high": 1.6}
    metrics = ("step_ratio", "training_memory_ratio", "parameter_ratio")
    rows = [{"name": "keel", "metric": metric, **spread} for metric in metrics]
    (tmp_path / "docs" / "measured" / "costs.json").write_text(json.dumps(rows))
    assert make_method_tables.method_costs().splitlines()[-1] == "| `keel` | 1.50 (1.40 to 1.60) | 1.50 | 1.50 |"


def test_what_was_learnt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(make_method_tables, "STUDIES", tmp_path)
    for study, name, lr, loss in [
        ("one", "dyt", 1e-3, 4.9),
        ("one", "keel", 1e-3, 4.0),
        ("other", "keel", 3e-3, None),
        ("one", "rezero", 1e-3, None),
    ]:
        folder = tmp_path / study / "results"
        folder.mkdir(parents=True, exist_ok=True)
        result = {"point": {"model.method": name}, "lr": lr, "val_loss": loss, "unigram_loss": 5.0}
        (folder / f"{name}-{lr}.json").write_text(json.dumps(result))
        (folder / "baselines.json").write_text(json.dumps({"0": 3.7}))
    assert make_method_tables.learnt("model.method", "one", "other")().splitlines() == [
        "| model.method | 0.001 | 0.003 | below unigram | at least 0.3 |",
        "| --- | --- | --- | --- | --- |",
        "| `keel` | 4.000 | not finite | 1.00 | yes |",
        "| `dyt` | 4.900 |  | 0.10 | **no** |",
        "| `rezero` | not finite |  |  | **no** |",
    ]


def test_other_tables_of_a_page_stay():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    assert filled(page, {"one": lambda: "new"}) == page.replace("old", "new")


def test_the_largest_errors_of_the_tests_are_kept(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(make_method_tables, "PARITY", tmp_path / "parity.json")
    values = ("keel 1e-16 3e-15", "keel 2e-16 1e-15", "admin 0 1e-15")
    cases = "".join(f'<testcase><property name="parity" value="{each}"/></testcase>' for each in values)
    report = tmp_path / "parity.xml"
    report.write_text(f"<testsuites><testsuite>{cases}<testcase/></testsuite></testsuites>")
    make_method_tables.take_parity(report)
    rows = make_method_tables.parity().splitlines()[2:]
    assert rows == ["| `admin` | 1 | 0 | 1e-15 |", "| `keel` | 2 | 2e-16 | 3e-15 |"]
