"""Checks that no two classes share a name: `python tests/lint/class_names.py`.

The modelling file of exported models is read without the package, so its names are its own.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = ROOT / "stablelm" / "export" / "hf_model" / "modeling_stablelm.py"


def classes(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Where each class is defined, as file:line, by its name."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    return found


def repeated(found: Mapping[str, list[str]]) -> list[str]:
    """A line for each name that several classes have."""
    return [f"{', '.join(places)}: classes of one name, {name}" for name, places in found.items() if len(places) > 1]


def main() -> int:
    problems = repeated(classes(path for path in (ROOT / "stablelm").rglob("*.py") if path != ALONE))
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
