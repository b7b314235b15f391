"""Fills the tables of docs/performance.md.

    python docs/make_performance_page.py

The prediction for a GPU is made by the formulas of `stablelm plan` (`stablelm/plan/step_time.py`). The measured tables
come from docs/figures/performance/: goals.json (benchmarks/goals.py), train-step.json (benchmarks/train_step.py) and
profile-before.json and profile-after.json (benchmarks/step_profile.py); where a file is missing the page says so.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stablelm
from docs.filled_tables import filled, table

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "performance.md"
MEASURED = REPOSITORY / "docs" / "figures" / "performance"
NOT_YET = "*Not measured yet: docs/figures/performance/{name} does not exist.*"
GPU = "h100-80"
# Layers, width, sequences, tokens of each.
SHAPES = ((24, 1024, 16, 1024), (96, 512, 16, 1024), (192, 256, 16, 1024), (24, 2048, 8, 2048))
METHODS = ("pre_ln", "deepscalelm_pre", "deepscalelm_sigma", "magneto")
Rows = list[dict[str, Any]]


def prediction() -> str:
    """Of each shape and method, without recompute."""
    rows = []
    for n_layers, d_model, batch, seq_len in SHAPES:
        for method in METHODS:
            settings = {
                "model.method": method,
                "model.n_layers": n_layers,
                "model.d_model": d_model,
                "model.n_heads": d_model // 64,
                "model.vocab_size": 32_000,
                "data.seq_len": seq_len,
                "train.global_batch_size": batch,
                "train.steps": 1,
                "train.precision": "bf16",
                "train.compile": "true",
                "engine.kind": "single",
            }
            config = stablelm.load_config(overrides=[f"{key}={value}" for key, value in settings.items()])
            found = stablelm.plan(config, world_size=1, gpu=GPU, quick=True)["estimated"]
            rows.append(
                (
                    *(f"{n_layers} × {d_model} at {batch} × {seq_len}", method, f"{1000 * found['products']:.1f}"),
                    *(f"{1000 * found['traffic']:.1f}", f"{1000 * found['update']:.1f}"),
                    *(f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.0%}"),
                )
            )
    columns = ("shape", "method", "matmul, ms", "memory-bound, ms", "update, ms", "tokens/s", "MFU")
    return table(columns, rows)


def read(name: str) -> Rows | None:
    file = MEASURED / name
    return json.loads(file.read_text()) if file.exists() else None


def goals() -> str:
    found = read("goals.json")
    if found is None:
        return NOT_YET.format(name="goals.json")
    from benchmarks.goals import Reached
    from benchmarks.goals import table as goal_table

    return goal_table([Reached(**row) for row in found]).strip()


def contestants() -> str:
    """A row each contestant and shape."""
    found = read("train-step.json")
    if found is None:
        return NOT_YET.format(name="train-step.json")
    of: dict[tuple[str, str], dict[str, float]] = {}
    for each in found:
        of.setdefault((each["shape"], each["name"]), {})[each["metric"]] = each["median"]
    rows = [
        (
            *(shape, name, f"{each['tokens_per_second']:,.0f}", f"{each['peak_memory_bytes'] / 1e9:.2f}"),
            *(f"{each['training_memory_bytes'] / 1e9:.2f}", f"{each['first_step_seconds']:.1f}"),
            *(f"{each['flops_share']:.2f}", f"{each['parameters'] / 1e6:.1f}"),
        )
        for (shape, name), each in of.items()
    ]
    columns = ("shape", "contestant", "tokens/s", "peak, GB", "training, GB", "first step, s", "share", "parameters, M")
    return table(columns, rows)


def profiles() -> str:
    """Shares of the operators of each shape and mode, before and after where both were measured."""
    kept = {when: found for when in ("before", "after") if (found := read(f"profile-{when}.json")) is not None}
    if not kept:
        return NOT_YET.format(name="profile-after.json")
    share = {
        when: {(r["shape"], r["mode"], r["operator"]): f"{r['share']:.1%} ({r['milliseconds']:.0f} ms)" for r in found}
        for when, found in kept.items()
    }
    keys = list(dict.fromkeys(key for found in share.values() for key in found))
    order = {key[:2]: number for number, key in enumerate(reversed(keys))}
    keys.sort(key=lambda key: -order[key[:2]])
    rows = [(*key[:2], f"`{key[2]}`", *(found.get(key, "") for found in share.values())) for key in keys]
    return table(("shape", "mode", "operator", *share), rows)


TABLES = {"goals": goals, "contestants": contestants, "profiles": profiles, "prediction": prediction}


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
