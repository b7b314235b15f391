"""The sources of `data.mixture`: where each lies and how much of a run it is, with the rules they must keep."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stablelm.config.schema import DataConfig

NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Source:
    """`weights`: by the data step (from 0) from which each holds; before the first a source is not used."""

    path: str | list[str] = ""
    weights: dict[int, float] = field(default_factory=dict)


def sources(data: DataConfig) -> dict[str, Source]:
    """Sources by name, in the order in which they were written; entries that `problems` names are left out."""
    found: dict[str, Source] = {}
    for entry, value in data.mixture.items():
        name, _, rest = entry.partition(".")
        step = _step(rest)
        if rest == "path" and isinstance(value, str | list | tuple):
            found.setdefault(name, Source()).path = value if isinstance(value, str) else list(value)
        elif step is not None and _is_weight(value):
            found.setdefault(name, Source()).weights[step] = float(value)  # type: ignore[arg-type]
    return found


def problems(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(sentence, key) for each mistake in `data.mixture`."""
    if not data.mixture:
        return
    if data.path != "embedded":
        yield "data.path and data.mixture both say what to train on; leave one out", "data.path"
    wrong = False
    for entry, value in data.mixture.items():
        for problem in _entry_problems(entry, value):
            wrong = True
            yield problem, f"data.mixture.{entry}"
    if wrong:
        return
    known = sources(data)
    for name, source in known.items():
        key = f"data.mixture.{name}"
        if not source.path:
            yield f"{key} has no path; give one, as in {key}.path=...", key
        if not source.weights:
            yield f"{key} has no weight; give one, as in {key}.weight=0.5", key
    for step in sorted({0, *(step for source in known.values() for step in source.weights)}):
        if not any(weight_at(source, step) for source in known.values()):
            yield f"data.mixture gives no source a weight at step {step}; give one a weight above 0", "data.mixture"


def weight_at(source: Source, step: int) -> float:
    """The weight that holds at a data step."""
    begun = [first for first in source.weights if first <= step]
    return source.weights[max(begun)] if begun else 0.0


def _entry_problems(entry: str, value: Any) -> Iterator[str]:
    name, _, rest = entry.partition(".")
    key = f"data.mixture.{entry}"
    if not NAME.fullmatch(name):
        yield f"{key}: the name of a source has only letters, digits, _ and -; rename it"
    elif rest == "path":
        if not isinstance(value, str | list | tuple):
            yield f"{key}={value} must be a path or a list of paths; quote it to make it a string"
    elif _step(rest) is None:
        yield f"{key}: a source has a path and a weight, or weight.<step> from which it holds; give one of these"
    elif not _is_weight(value):
        yield f"{key}={value} must be a number from 0 up"


def _step(rest: str) -> int | None:
    if rest == "weight":
        return 0
    match = re.fullmatch(r"weight\.(\d+)", rest)
    return int(match[1]) if match else None


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
