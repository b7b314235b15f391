"""Recorded studies: a line of JSON for each cell that was tuned and confirmed, shipped with the package.

`stablelm study report --records FILE` writes the lines of a study; `stablelm advise` reads those of the package and of
other files.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import TypedDict

from stablelm.config.schema import Config
from stablelm.errors import ConfigError
from stablelm.json_text import Count, Number, parse
from stablelm.small_files import read_small
from stablelm.study.report.conclusions import beats_bigram
from stablelm.study.report.findings import CellFinding, Findings
from stablelm.study.study_file import DEPTH

PACKAGED = Path(__file__).parent / "records.jsonl"
VARIED = ("model.method", DEPTH, "warmup_fraction", "tokens_per_parameter", "flops")


class StudyRecord(TypedDict):
    """A cell at its best rate. Losses in nats per token; `half`: of the interval of the mean over seeds."""

    study: str
    method: str
    other: dict[str, object]
    """Further keys of the grid: a record with any is not that of the plain method."""
    n_layers: Count
    d_model: Count
    tokens: Count
    parameters: Count
    """Of the layers."""
    vocab_size: Count
    warmup_fraction: Number
    rate: Number
    rate_low: Number
    rate_high: Number
    loss: Number
    half: Number | None
    bigram: Number | None
    seeds: list[Count]
    runs: list[str]
    commit: str | None


def records_of(found: Findings) -> Iterator[StudyRecord]:
    """Cells whose search found a best rate, whose seeds agree to be finite, and which beat the bigram model."""
    for each in found.cells:
        if each.best_rate is not None and found.mean(each) is not None and beats_bigram(found, each):
            yield _record(found, each, each.best_rate)


def _record(found: Findings, each: CellFinding, rate: float) -> StudyRecord:
    mean, config = found.mean(each), each.cell.config
    assert mean is not None
    low, high = _interval(found, each, rate)
    train = config.train
    return {
        "study": found.study.study,
        "method": method_of(config),
        "other": {key: value for key, value in each.cell.point if key not in VARIED},
        "n_layers": each.cell.shape.n_layers,
        "d_model": each.cell.shape.d_model,
        "tokens": each.cell.tokens,
        "parameters": each.cell.counts["layers"],
        "vocab_size": config.model.vocab_size or 0,
        "warmup_fraction": round(train.warmup_steps / (train.steps or 1), 4),
        "rate": rate,
        "rate_low": low,
        "rate_high": high,
        "loss": round(mean.mean, 5),
        "half": None if mean.half is None else round(mean.half, 5),
        "bigram": each.bigram,
        "seeds": sorted(each.by_seed),
        "runs": [run["id"] for run in each.confirming],
        "commit": next((run["provenance"].get("commit") for run in each.confirming), None),
    }


def method_of(config: Config) -> str:
    return config.model.method


def _interval(found: Findings, each: CellFinding, rate: float) -> tuple[float, float]:
    """Of the parabola's lowest point where there is one, else the neighbours that were worse."""
    if each.vertex is not None and each.vertex.high > each.vertex.low:
        return float(f"{min(each.vertex.low, rate):.4g}"), float(f"{max(each.vertex.high, rate):.4g}")
    tried = sorted(each.by_rate)
    place = tried.index(rate)
    return tried[max(0, place - 1)], tried[min(len(tried) - 1, place + 1)]


def as_lines(records: Iterator[StudyRecord] | Sequence[StudyRecord]) -> str:
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)


def read_records(files: Sequence[Path] = (PACKAGED,)) -> list[StudyRecord]:
    """Of all files. Raises ConfigError with the line of a record that is none."""
    found: list[StudyRecord] = []
    for file in files:
        try:
            lines = read_small(file).splitlines()
        except OSError as error:
            raise ConfigError(f"--records {file} cannot be read: {error.strerror}; name a file of records") from None
        for number, line in enumerate(lines, 1):
            try:
                record = parse(line, StudyRecord)
            except ValueError as error:
                raise ConfigError(f"{file}:{number} is not a record of a study ({error}); delete the line") from None
            if not all(math.isfinite(record[name]) and record[name] > 0 for name in ("rate", "loss", "tokens")):
                raise ConfigError(f"{file}:{number}: rate, loss and tokens must be above 0; delete the line")
            found.append(record)
    return found
