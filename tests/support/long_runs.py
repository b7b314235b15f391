"""A run directory as a long run of a deep model leaves it, made up: records of every step and of every layer."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

TOKENS = 1 << 20
"""Of a step."""
ATTEMPTS = ((0.0, 64), (0.42, 64), (0.71, 128))
"""Where each began, as a share of the run, and on how many processes."""
REPEATED = 400
"""Steps that an attempt after the first takes again."""


def write_long_run(folder: Path, *, steps: int, layers: int, layers_every: int, evaluate_every: int) -> Path:
    """A run of `steps` with a record each; every `layers_every` steps seven figures of each layer."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "wb") as file:
        for record in _records(steps, layers, layers_every, evaluate_every):
            file.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    model = f"model:\n  method: deepscalelm_pre\n  n_layers: {layers}\n  d_model: 1024\n"
    train = f"train:\n  steps: {steps}\n  precision: bf16\n  global_batch_size: 512\nengine:\n  kind: fsdp2\n"
    (folder / "resolved.yaml").write_text(model + train)
    summary = {"exit_code": 0, "reason": "finished", "attempts": len(ATTEMPTS), "step": steps, "params": 2_450_000_000}
    (folder / "summary.json").write_text(json.dumps(summary))
    attempts = [
        {"attempt": number, "time": f"2026-10-0{number}T08:00:00+00:00", "commit": "0123456789abcdef", "diff": None,
         "argv": ["launch/pretrain.py", "--config", "deep.yaml"], "world_size": world, "hosts": ["node1", "node2"],
         "python": "3.11.7", "system": "Linux", "versions": {"torch": "2.13.0"}}
        for number, (_, world) in enumerate(ATTEMPTS, 1)
    ]  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(attempts))
    return folder


def _records(steps: int, layers: int, layers_every: int, evaluate_every: int) -> Iterator[dict[str, Any]]:
    drawn = np.random.default_rng(0)
    starts = [round(share * steps) for share, _ in ATTEMPTS] + [steps]
    for attempt, (start, end) in enumerate(pairwise(starts), 1):
        world = ATTEMPTS[attempt - 1][1]
        for step in range(max(1, start - REPEATED + 1), end + 1):
            counters = {"step": step, "tokens": step * TOKENS, "attempt": attempt}
            yield counters | _training(step, steps, world, drawn)
            if step % layers_every == 0:
                yield counters | _of_layers(step, steps, layers, drawn)
            if step % evaluate_every == 0:
                loss = _loss(step) + 0.03
                yield counters | {"val_loss/web": loss, "val_loss/code": loss - 0.6, "val_bits_per_byte/web": loss / 3}


def _loss(step: int) -> float:
    return 2.05 + 8.9 * (1 + step / 120) ** -0.55


def _training(step: int, steps: int, world: int, drawn: np.random.Generator) -> dict[str, float]:
    noise, spike = drawn.normal(size=4), 2.5 * (step % 9973 == 0)
    seconds = 64 / world * (1.9 + 0.03 * abs(noise[0]) + 1.2 * (step % 1000 == 0))
    warm = min(1.0, step / 2000)
    return {
        "loss": _loss(step) + 0.02 * noise[1] + spike,
        "grad_norm": float(np.exp(-1 + 0.15 * noise[2] + spike) + 3 / (1 + step / 200)),
        "lr": 3e-4 * warm * (0.1 + 0.45 * (1 + np.cos(np.pi * step / steps))),
        "tokens_per_second": TOKENS / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": 0.004 * abs(noise[3]),
        "memory_bytes": 61e9 + 1e5 * step**0.5,
        "mfu": 0.41 * 1.9 / seconds * 64 / world,
        "data_epoch": step / steps * 0.8,
        "skipped_steps": step // 40_000,
        "skipped_rows": 0,
        "unknown_tokens": 0.0,
        "store_wait_seconds": 0.0,
    }


def _of_layers(step: int, steps: int, layers: int, drawn: np.random.Generator) -> dict[str, float]:
    depth, done = np.arange(layers + 1) / layers, step / steps
    wave = 0.15 * np.sin(9 * depth + 5 * done) + 0.05 * drawn.normal(size=layers + 1)
    columns = {
        "stream_rms": np.exp(0.2 * wave) * (0.6 + (1 + 3 * done) * depth**1.5),
        "branch_rms": np.exp(wave) * (0.3 + 0.4 * done * depth),
        "grad_norm": np.exp(wave - 4 - 2.5 * done + 2 * (1 - depth)),
        "weight_grad_norm": np.exp(wave - 3 + 1.5 * np.cos(6 * depth) - done),
        "token_correlation": np.clip(0.05 + 0.5 * depth * (1 - 0.6 * done) + 0.03 * wave, 0, 1),
    }
    found = {f"layer/{i:04d}/{name}": float(v) for name, column in columns.items() for i, v in enumerate(column)}
    for name, column in {
        "entropy": 5.2 - 2.5 * done + wave * (1 + depth),
        "logit_max": np.exp(1 + 2 * done + wave),
    }.items():
        found |= {f"attention/{i:04d}/{name}": float(column[i]) for i in range(1, layers + 1)}
    return found | {"embedding/tev_mean": 0.02 + 0.01 * done, "embedding/tev_std": 0.004, "layers_seconds": 1.9}
