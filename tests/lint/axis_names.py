"""Checks that no code compares with the name of an axis value: `python tests/lint/axis_names.py`.

Code asks the value (`methods.axes`) instead, so that a method costs one file. Reported are comparisons, membership
tests, match cases and dictionary keys with such a name, and isinstance of an axis value, outside its own file and the
catalogue.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from stablelm.methods import axes, catalogue  # noqa: E402 - after the path is set

ORDINARY = {"none", "unit", "post"}
"""Names that are words of other things too: no offload, the unit of a key, an HTTP request."""
METRICS = {"sigma"}
"""Names of metrics and sections too, which may be keys of a dictionary."""
CHECKED = ("stablelm", "launch", "data")


def own_files() -> dict[str, set[Path]]:
    """The files that define the values of each name."""
    found: dict[str, set[Path]] = {}
    for axis in catalogue.KEYS:
        for name, value in catalogue.values(axis).items():
            found.setdefault(name, set()).add(_file(value, name))
    return {name: files for name, files in found.items() if name not in ORDINARY}


def _file(value: axes.Value, name: str) -> Path:
    if type(value) is not axes.Placement:
        return Path(inspect.getfile(type(value)))
    quoted = f'Placement("{name}"'
    return next(path for path in (ROOT / "stablelm" / "methods").glob("*.py") if quoted in path.read_text())


def classes() -> set[str]:
    """The classes of axis values, and those they derive from."""
    values = [value for axis in catalogue.KEYS for value in catalogue.values(axis).values()]
    return {kind.__name__ for value in values for kind in type(value).__mro__ if issubclass(kind, axes.Value)}


def findings(source: str, names: set[str], kinds: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what stands there) for each use of a name that decides something."""
    for node in ast.walk(ast.parse(source)):
        used: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            used = [part for side in (node.left, *node.comparators) for part in getattr(side, "elts", [side])]
        elif isinstance(node, ast.MatchValue):
            used = [node.value]
        elif isinstance(node, ast.Dict):
            used = [key for key in node.keys if getattr(key, "value", None) not in METRICS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            wanted = getattr(node.args[1], "elts", [node.args[1]])
            hits = {getattr(each, "id", getattr(each, "attr", "")) for each in wanted} & kinds
            yield from ((node.lineno, f"isinstance {hit}") for hit in sorted(hits))
        for part in used:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value in names:
                yield part.lineno, repr(part.value)


def main() -> int:
    owners, kinds, found = own_files(), classes(), 0
    catalogue_file = Path(catalogue.__file__)
    for path in sorted(path for folder in CHECKED for path in (ROOT / folder).rglob("*.py")):
        names = {name for name, files in owners.items() if path not in files}
        if path == catalogue_file:
            continue
        for line, what in findings(path.read_text(encoding="utf-8"), names, kinds):
            print(f"{path.relative_to(ROOT)}:{line}: {what}: ask the axis value instead (stablelm/methods/axes.py)")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
