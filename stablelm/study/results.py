"""Results of runs: one small JSON file each, with all that the report needs and a hash that shows later changes."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict
from typing_extensions import TypedDict

from stablelm.errors import ConfigError
from stablelm.json_text import Count, Number, as_number, parse
from stablelm.new_files import replace_file
from stablelm.small_files import read_small

ID_LENGTH = 16
SEAL = "sha256"
NOT_FINITE, NOTHING_LEARNT, SPIKED, TRAINED = "not finite", "nothing learnt", "spiked", "trained"
OUTCOMES = (NOT_FINITE, NOTHING_LEARNT, SPIKED, TRAINED)
LEARNT = 0.1  # nats below the unigram model
SPIKE = 0.5  # nats above the lowest smoothed loss so far, after the warm-up
SMOOTH, LAST = 10, 20  # steps
POINTS = 128  # of a curve


class Sealed(TypedDict):
    """What every result of a study has."""

    id: str
    study: str
    point: dict[str, Any]
    shape: dict[str, Count]
    parameters: dict[str, Count]
    lr: Number
    seed: Count
    seconds: Number
    """Of steps alone."""
    provenance: dict[str, Any]


class Result(Sealed):
    """A finished run. Losses in nats per token, None where they are not finite."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    steps: Count
    tokens: Count
    flops: Number
    outcome: str
    train_loss: Number | None
    val_loss: Number | None
    unigram_loss: Number | None
    first_loss: Number | None
    curve: list[list[Number | None]]
    """Step and mean loss since the point before."""
    signal: dict[str, dict[str, Number]]
    """Measurements of layers at the `start` and the `end`, by metric; empty where the run made none."""
    layers: dict[str, Any] | None
    """What `study.measure` found, None where it was not asked."""


R = TypeVar("R")


def loss_of(result: Result) -> float:
    """What the search compares: the validation loss, infinite where the run diverged."""
    value = result["val_loss"]
    return math.inf if value is None or result["outcome"] == NOT_FINITE else float(value)


def outcome(losses: list[float], val_loss: float | None, unigram: float | None, warmup: int) -> str:
    """One of OUTCOMES, from the training loss of each step and the two losses on the validation text."""
    if val_loss is None or not math.isfinite(val_loss) or not all(map(math.isfinite, losses[-LAST:])):
        return NOT_FINITE
    if unigram is not None and val_loss > unigram - LEARNT:
        return NOTHING_LEARNT
    smooth = [sum(losses[i : i + SMOOTH]) / SMOOTH for i in range(warmup, len(losses) - SMOOTH + 1)]
    lowest = math.inf
    for value in smooth:
        lowest = min(lowest, value)
        if not value <= lowest + SPIKE:
            return SPIKED
    return TRAINED


def curve(losses: Mapping[int, float]) -> list[list[Number | None]]:
    """At most POINTS of them, each the mean of the steps since the one before; not finite ones are None."""
    steps, size = sorted(losses), max(1, math.ceil(len(losses) / POINTS))
    parts = [steps[first : first + size] for first in range(0, len(steps), size)]
    return [[part[-1], finite(sum(losses[step] for step in part) / len(part))] for part in parts]


def finite(value: float | None, digits: int = 6) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(as_number(dict(result))))
    replace_file(folder / f"{result['id']}.json", json.dumps(plain | {SEAL: seal(plain)}, indent=None) + "\n")


def seal(plain: Mapping[str, Any]) -> str:
    own = {name: value for name, value in plain.items() if name != SEAL}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_results(folder: Path) -> dict[str, Result]:
    """Those of training runs by id. Raises ConfigError with a line for each file that is damaged or was changed."""
    return read_sealed(folder, Result)


def read_sealed(folder: Path, kind: type[R]) -> dict[str, R]:
    """Results of a kind by id. Raises ConfigError with a line for each file that is damaged or was changed by hand."""
    found, problems = {}, []
    for file in sorted(folder.glob(f"{'[0-9a-f]' * ID_LENGTH}.json")):
        try:
            result: Any = parse(read_small(file), kind)
        except (OSError, ValueError) as error:
            problems.append(f"{file} is no result of a run ({error}); delete it, and the run is made again")
            continue
        if result.get(SEAL) != seal(result) or result["id"] != file.stem:
            problems.append(f"{file} was changed after it was written; delete it, and the run is made again")
            continue
        found[result["id"]] = result
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def losses(results: Iterable[Result]) -> dict[str, float]:
    """By id."""
    return {result["id"]: loss_of(result) for result in results}
