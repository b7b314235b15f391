"""Fills the measured tables of docs/methods/index.md and docs/optimizers.md.

    python docs/make_method_tables.py [--parity parity.xml]

What steps cost comes from docs/figures/methods/: costs.json (benchmarks/method_costs.py) and optimizer-costs.json
(benchmarks/optimizers.py); what was learnt from the results of the studies `every-method`,
`every-method-other-rates` and `every-optimizer` in docs/studies/. --parity takes over what a report of the tests says
(`pytest tests/methods --junit-xml parity.xml`). Where one is missing the page says so.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docs.filled_tables import filled, table

DOCS = Path(__file__).resolve().parent
MEASURED, STUDIES = DOCS / "figures" / "methods", DOCS / "studies"
PARITY = MEASURED / "parity.json"
LEARNT = 0.3  # nats below the unigram model
Rows = list[dict[str, Any]]


def read(file: Path) -> Rows | None:
    return json.loads(file.read_text()) if file.exists() else None


def missing(file: Path) -> str:
    return f"*Not measured yet: {file.relative_to(DOCS.parent)} does not exist.*"


def by_name(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["metric"]] = row
    return found


def spread(row: dict[str, Any]) -> str:
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def method_costs() -> str:
    file = MEASURED / "costs.json"
    rows = read(file)
    if rows is None:
        return missing(file)
    lines = [
        (
            *(f"`{name}`", spread(found["step_ratio"])),
            *(f"{found[metric]['median']:.2f}" for metric in ("training_memory_ratio", "parameter_ratio")),
        )
        for name, found in by_name(rows).items()
    ]
    return table(("method", "step", "memory", "parameters"), lines)


def optimizer_costs() -> str:
    file = MEASURED / "optimizer-costs.json"
    rows = read(file)
    if rows is None:
        return missing(file)
    found = by_name(rows)
    base = found["adamw"]["state_bytes"]["median"]
    lines = [
        (name.join("``"), spread(each["step_ratio"]), f"{each['state_bytes']['median'] / base:.2f}")
        for name, each in found.items()
    ]
    return table(("optimizer", "step", "state"), lines)


def take_parity(report: Path) -> None:
    """Keeps the largest errors of each method in a report of its tests, and in how many cases it was compared."""
    found: dict[str, list[tuple[float, float]]] = {}
    for each in ElementTree.parse(report).iter("property"):
        if each.get("name") == "parity":
            method, forward, backward = str(each.get("value")).split()
            found.setdefault(method, []).append((float(forward), float(backward)))
    largest = {name: [max(each) for each in zip(*errors, strict=True)] for name, errors in sorted(found.items())}
    rows = [
        {"name": name, "cases": len(found[name]), "output": output, "gradients": gradients}
        for name, (output, gradients) in largest.items()
    ]
    PARITY.write_text(json.dumps(rows, indent=1) + "\n")


def parity() -> str:
    rows = read(PARITY)
    if rows is None:
        return missing(PARITY)
    lines = [(f"`{row['name']}`", str(row["cases"]), f"{row['output']:.1g}", f"{row['gradients']:.1g}") for row in rows]
    return table(("method", "cases", "output", "gradients"), lines)


def learnt(key: str, *studies: str) -> Callable[[], str]:
    """One table of studies whose cells differ in `key` and in the learning rate."""

    def made() -> str:
        folders = [STUDIES / study / "results" for study in studies]
        results = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("*.json"))]
        results = [each for each in results if "point" in each]
        if not results:
            return missing(folders[0])
        rates = sorted({each["lr"] for each in results})
        unigram = results[0]["unigram_loss"]
        loss: dict[str, dict[float, Any]] = {}
        for each in results:
            loss.setdefault(each["point"][key], {})[each["lr"]] = each
        lines = []
        for name, own in sorted(loss.items(), key=lambda item: _best(item[1].values())):
            below = unigram - _best(own.values())
            cells = [_cell(own[rate]) if rate in own else "" for rate in rates]
            shown = f"{below:.2f}" if math.isfinite(below) else ""
            lines.append((f"`{name}`", *cells, shown, "yes" if below >= LEARNT else "**no**"))
        return table((key, *(f"{rate:g}" for rate in rates), "below unigram", "at least 0.3"), lines)

    return made


def _best(results: Any) -> float:
    return min(float("inf") if each["val_loss"] is None else each["val_loss"] for each in results)


def _cell(result: dict[str, Any]) -> str:
    return "not finite" if result["val_loss"] is None else f"{result['val_loss']:.3f}"


PAGES = {
    DOCS / "methods" / "index.md": {
        "costs": method_costs,
        "parity": parity,
        "learnt": learnt("model.method", "every-method", "every-method-other-rates"),
    },
    DOCS / "optimizers.md": {"costs": optimizer_costs, "learnt": learnt("train.optimizer", "every-optimizer")},
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parity", type=Path, help="report of the tests of methods, whose errors are kept")
    if (report := parser.parse_args().parity) is not None:
        take_parity(report)
    for page, tables in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
