"""What `make test-gpu` found: one JSON file and one page."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


class GpuReport:
    """Figures and outcomes in the order in which they came."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.tests: dict[str, dict[str, Any]] = {}

    def add(self, section: str, name: str, **values: Any) -> None:
        """A row of the table `section`, whose columns are the names of the values."""
        self.figures.append({"section": section, "name": name, **values})

    def finished(self, report: pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if report.failed:
            reason = str(report.longrepr).strip().splitlines()[-1]
        self.tests[report.nodeid] = {
            "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "reason": reason,
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "tests": list(self.tests.values()), "figures": self.figures}
        (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "gpu.md").write_text(page(found))
        print(f"\nwritten: {folder / 'gpu.json'} and {folder / 'gpu.md'}")


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "host": platform.machine()}
    if not torch.cuda.is_available():
        return {**found, "gpu": None}
    told = torch.cuda.get_device_properties(0)
    return {
        **found, "gpu": told.name, "cuda": torch.version.cuda, "memory_bytes": told.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# stablelm on this GPU", ""]
    lines += [f"- {key}: {value}" for key, value in found["machine"].items()]
    for section in dict.fromkeys(row["section"] for row in found["figures"]):
        rows = [
            {k: v for k, v in row.items() if k != "section"} for row in found["figures"] if row["section"] == section
        ]
        lines += ["", f"## {section}", "", *table(rows)]
    return "\n".join([*lines, "", "## Tests", "", *table(found["tests"]), ""])


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
