"""From a finished run's folder to its result."""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.errors import EXIT_FINISHED, DivergedError
from stablelm.observe import provenance
from stablelm.observe.sinks import last_records
from stablelm.study import results
from stablelm.study.cells import Run
from stablelm.study.results import Result, finite
from stablelm.study.study_file import Study
from stablelm.supervise.attempts import read_summary

FINISHED = (EXIT_FINISHED, DivergedError.exit_code)
LAYERS = ("layer/", "attention/")


def run_dir(study: Study, run: Run) -> Path:
    return study.folder / "runs" / run.id


def placed(study: Study, run: Run) -> Config:
    """A run's configuration with its folder."""
    config = run.config
    return replace(config, run=replace(config.run, dir=str(run_dir(study, run))))


def measures_file(study: Study, run: Run) -> Path:
    """What `study.measure` writes."""
    return run_dir(study, run) / "measures.json"


def is_finished(study: Study, run: Run) -> bool:
    return read_summary(run_dir(study, run)).get("exit_code") in FINISHED


def keep_finished(study: Study, run: Run, say: Callable[[str], None]) -> Result | None:
    """Writes the result of a run that has finished, and removes its checkpoints unless the study keeps them.

    None where it has not finished. Raises OSError.
    """
    if not is_finished(study, run):
        return None
    measures = measures_file(study, run)
    layers = json.loads(measures.read_text()) if measures.exists() else None
    result = collect(study, run, layers)
    results.write_result(study.results_folder, result)
    if not study.keep_checkpoints:
        shutil.rmtree(run_dir(study, run) / "checkpoints", ignore_errors=True)
    loss = f"loss {result['val_loss']:.4f}" if result["val_loss"] is not None else "no loss"
    say(f"{run}: {result['outcome']}, {loss}, {result['seconds']:.0f} s")
    return result


def collect(study: Study, run: Run, layers: Any = None) -> Result:
    """The result of a run that has finished; `layers`: what was measured of its layers."""
    folder, config = run_dir(study, run), run.cell.config
    summary, records = read_summary(folder), last_records(folder / "metrics.jsonl")
    train = {step: record["loss"] for step, record in records.items() if "loss" in record}
    losses = [train[step] for step in sorted(train)]
    val, unigram = (_only(summary.get(name)) for name in ("val_loss", "unigram_loss"))
    if summary["exit_code"] == DivergedError.exit_code:
        val = None
    result: Any = {
        **asked(study, run),
        "steps": config.train.steps or 0,
        "tokens": run.cell.tokens,
        "flops": run.cell.flops,
        "outcome": results.outcome(losses, val, unigram, config.train.warmup_steps),
        "train_loss": finite(sum(losses[-results.LAST :]) / results.LAST) if len(losses) >= results.LAST else None,
        "val_loss": finite(val),
        "unigram_loss": finite(unigram),
        "first_loss": finite(losses[0]) if losses else None,
        "curve": results.curve(train),
        "seconds": round(sum(record.get("step_seconds", 0.0) for record in records.values()), 1),
        "provenance": _provenance(folder, run),
        "signal": _signal(records),
        "layers": layers,
    }
    return result


def asked(study: Study, run: Run) -> Any:
    """What a result has of the study file."""
    return {
        "id": run.id,
        "study": study.study,
        "point": dict(run.cell.point),
        "shape": dict(vars(run.cell.shape)),
        "parameters": run.cell.counts,
        "lr": run.lr,
        "seed": run.seed,
    }


def _only(values: Any) -> float | None:
    """The value of the one validation set, or of the first of several."""
    value = next(iter(values.values()), None) if isinstance(values, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _signal(records: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measurements by layer at the first and at the last step that has any."""
    steps = [step for step in sorted(records) if any(name.startswith(LAYERS) for name in records[step])]
    ends = {"start": steps[0], "end": steps[-1]} if steps else {}
    return {
        place: {
            name: value for name, value in records[step].items() if name.startswith(LAYERS) and math.isfinite(value)
        }
        for place, step in ends.items()
    }


def _provenance(folder: Path, run: Run) -> dict[str, Any]:
    attempts = provenance.read(folder)
    last = attempts[-1] if attempts else {}
    return {
        "commit": last.get("commit"),
        "changed": bool(last.get("diff")),
        "versions": last.get("versions"),
        "hosts": last.get("hosts"),
        "attempts": len(attempts),
        **origin(run),
    }


def origin(run: Run) -> dict[str, Any]:
    """What a result comes of, beside the program: hashes, data and this machine."""
    return {
        "processor": processor(),
        "config": hashlib.sha256(dump(run.config).encode()).hexdigest()[:16],
        "data": run.cell.identity["data.path"],
        "tokenizer": run.cell.identity["data.tokenizer"],
        "load": round(os.getloadavg()[0], 2),
        "cores": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    """The model of this machine's processor, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
