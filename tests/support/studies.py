"""Studies on the tiny corpus, and results of runs that never ran: a loss function in their place."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stablelm.study import results
from stablelm.study.agenda import agenda
from stablelm.study.cells import Cell, Run
from stablelm.study.results import Result, finite, write_result
from stablelm.study.study_file import Study
from support.tiny import TinyCorpus

BASE: dict[str, Any] = {
    "model": {"norm": "rmsnorm", "bias": False, "activation": "gelu", "tie_embeddings": False},
    "data": {"seq_len": 32, "lanes": 4},
    "train": {"global_batch_size": 4},
    "observe": {"every": 1, "page": False},
    "evaluate": {"every": 0, "batches": 2},
    "checkpoint": {"every": 0},
}
STUDY: dict[str, Any] = {
    "study": "tiny",
    "grid": {"model.method": ["pre_ln", "deepnorm"], "depth": [2, 4]},
    "shapes": {"rule": "fixed_width", "d_model": 32},
    "budget": {"tokens": 512},
    "lr": {"start": [1.0e-3, 4.0e-3, 1.6e-2]},
    "seeds": {"tune": [0], "confirm": [1, 2, 3]},
}


def write_study(folder: Path, corpus: TinyCorpus, **changes: Any) -> Path:
    """A study file and its base in a folder; a change to None leaves a key out."""
    data = {"path": corpus.train, "tokenizer": corpus.tokenizer, "validation": {"default": corpus.validation}}
    base = BASE | {"data": BASE["data"] | data}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"base": str(folder / "base.yaml"), **STUDY, "results": str(folder / "results"), "dir": None, **changes}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return file


def loss_like(run: Run) -> float:
    """Lowest at a rate of 4e-3 at depth 2, lower for deeper models; deepnorm .05 better; some noise by seed."""
    best = 4e-3 / math.sqrt(run.cell.shape.n_layers / 2)
    noise = random.Random(f"{run.id}").gauss(0.0, 0.004)
    gain = 0.05 * (dict(run.cell.point).get("model.method") == "deepnorm")
    depth = 0.1 * math.log2(run.cell.shape.n_layers)
    return 3.0 - depth - gain + 0.1 * math.log(run.lr / best) ** 2 + noise


def pretend(study: Study, cells: list[Cell], loss: Callable[[Run], float] = loss_like) -> dict[str, Result]:
    """Writes results until nothing is open, and returns them."""
    found: dict[str, Result] = {}
    while runs := [run for state in agenda(study, cells, results.losses(found.values())) for run in state.open]:
        for run in runs:
            found[run.id] = pretended(study, run, loss(run))
            write_result(study.results_folder, found[run.id])
    return found


def pretended(study: Study, run: Run, loss: float) -> Result:
    steps = run.cell.config.train.steps or 0
    draw = random.Random(run.id)
    windows = [round(loss + draw.gauss(0.0, 0.05), 5) for _ in range(8)]
    depth = run.cell.shape.n_layers
    layers = {
        "windows": windows,
        "layer_rises": {str(layer): 0.1 / (layer + 1) for layer in range(depth)},
        "block_rises": {f"{layer}-{layer}": 0.1 / (layer + 1) for layer in range(depth)},
        "angles": [0.2] * depth,
        "share_of_layers": 0.5,
        "start": {
            name: [1.0] * (depth + 1)
            for name in ("stream_variance", "gradient_norm", "predicted_stream_variance", "predicted_gradient_norm")
        },
    }
    curve = [[step, 6.0 - (6.0 - min(loss, 6.0)) * step / steps] for step in range(1, steps + 1)]
    return {
        "id": run.id,
        "study": study.study,
        "point": dict(run.cell.point),
        "shape": dict(vars(run.cell.shape)),
        "parameters": run.cell.counts,
        "lr": run.lr,
        "seed": run.seed,
        "steps": steps,
        "tokens": run.cell.tokens,
        "flops": run.cell.flops,
        "outcome": results.TRAINED if math.isfinite(loss) else results.NOT_FINITE,
        "train_loss": finite(loss),
        "val_loss": finite(loss),
        "unigram_loss": 5.0,
        "first_loss": 6.0,
        "curve": curve,  # type: ignore[typeddict-item]
        "seconds": 10.0 + depth,
        "provenance": {"commit": "c" * 40, "changed": False, "load": 1.0, "config": "f" * 16, "tokenizer": "t" * 64},
        "signal": {},
        "layers": layers if run.seed in study.seeds.confirm and math.isfinite(loss) else None,
    }
