"""The recorded runs that the probe quotes: small models, their signals at the start, and whether they then trained.

`run_records.jsonl` holds one JSON object a run: method, overrides, n_layers, d_model, lr, warmup_steps, steps, seed,
text, signals (as `signals.Signals`), outcome (trained or failed), first_loss, last_loss, val_loss and unigram_loss
(nats a token), commit. `benchmarks/trained.py` writes it.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stablelm.json_text import load
from stablelm.probe.signals import Signals

RECORDS = Path(__file__).with_name("run_records.jsonl")


@dataclass(frozen=True)
class RunRecord:
    """One run; `settings` tells models apart: all that was set but the rate, its warm-up and the length."""

    method: str
    settings: str
    n_layers: int
    d_model: int
    lr: float
    warmup_steps: int
    steps: int
    signals: Signals
    trained: bool


def read_records(path: Path = RECORDS) -> list[RunRecord]:
    """The runs of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [_record(load(line)) for line in path.read_text().splitlines()]


def _record(row: Any) -> RunRecord:
    signals = {field.name: float(row["signals"][field.name]) for field in fields(Signals)}
    return RunRecord(
        method=row["method"],
        settings=f"{row['method']} {row['overrides']} {row['n_layers']}x{row['d_model']} seed {row['seed']}",
        n_layers=row["n_layers"],
        d_model=row["d_model"],
        lr=row["lr"],
        warmup_steps=row["warmup_steps"],
        steps=row["steps"],
        signals=Signals(**signals),
        trained=row["outcome"] == "trained",
    )
