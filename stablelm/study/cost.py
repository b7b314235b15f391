"""What the runs of a study cost: seconds here, from runs like them or from this machine's matmuls, and GPU-hours."""

import os
import statistics
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.errors import ConfigError
from stablelm.methods.sizes import flops_per_token
from stablelm.observe.accelerators import chosen
from stablelm.study.cells import Cell
from stablelm.study.results import Result
from stablelm.study.study_file import Study

SHARE = 0.35
"""Of the rate of a layer's own matmuls that a step of a narrow model reaches, one thread on a CPU."""
START_SECONDS = 8.0
"""Of a process: imports, tokenizer, first step."""


class Cost(NamedTuple):
    """Of one run of a cell. `measured`: the seconds are those of runs of the same shape and budget."""

    seconds: float
    measured: bool
    gpus: int = 0
    gpu_hours: float | None = None
    kind: str = ""


def here(cell: Cell, found: Collection[Result]) -> Cost:
    """One thread of this machine."""
    own = [
        each["seconds"] * cell.flops / each["flops"]
        for each in found
        if each["shape"] == vars(cell.shape) and each["seconds"] > 0
    ]
    like = [each["seconds"] * cell.flops / each["flops"] for each in found if _is_like(each, cell)]
    if like or own:
        return Cost(START_SECONDS + statistics.median(like or own), True)
    return Cost(START_SECONDS + cell.flops / (SHARE * matmul_rate(cell.shape.d_model)), False)


def _is_like(result: Result, cell: Cell) -> bool:
    return result["shape"] == vars(cell.shape) and result["point"].get("model.method") == cell.config.model.method


TIMING = """
import sys, time, numpy as np
a, b = np.ones((1024, int(sys.argv[1])), np.float32), np.ones((int(sys.argv[1]), 4 * int(sys.argv[1])), np.float32)
best = float("inf")
for _ in range(20):
    began = time.process_time()
    np.matmul(a, b)
    best = min(best, time.process_time() - began)
print(2 * a.size * b.shape[1] / best)
"""


@cache
def matmul_rate(width: int) -> float:
    """FLOP/s of one thread in fp32 products of 1,024 rows and a matrix (width, 4 width); the quickest of several.

    In a process of its own: how many threads numpy uses is settled when it is imported.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TIMING, str(width)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


MFU = 0.4
"""Of the peak, where nothing but FLOPs is looked at."""


def by_flops(study: Study, cell: Cell) -> Cost:
    """GPU-hours of a run on `resources.gpu`, whatever their number; whether it fits is not looked at."""
    seconds = cell.flops / (chosen(study.resources.gpu, {}).peak * MFU)
    return Cost(seconds, False, 0, seconds / 3600)


def on_gpus(study: Study, cell: Cell) -> Cost:
    """By `stablelm plan`'s closed form, on the fewest GPUs of `resources.world_sizes` whose memory the run fits.

    Raises ConfigError where it fits none.
    """
    from stablelm.plan.planner import make
    from stablelm.plan.request import prepare

    accelerator, reasons = chosen(study.resources.gpu, {}), []
    for ranks, kind in product(study.resources.world_sizes, study.resources.kinds):
        asked = with_engine(cell.asked, kind)
        try:
            request = prepare(
                Loaded(asked, {}, asked), ranks, accelerator, study.resources.gpus_per_node, simulated=False, price=None
            )
        except ConfigError as error:
            reasons.append(f"{kind} on {ranks}: {error}")
            continue
        made = make(request, depth=False)
        if made.fits:
            seconds = (cell.config.train.steps or 0) * made.time.total
            return Cost(seconds, False, ranks, seconds * ranks / 3600, kind)
        reasons.append(f"{kind} on {ranks}: {made.peak.total() / 1e9:.1f} GB of {request.usable / 1e9:.1f}")
    raise ConfigError(
        f"{cell.name}: no world size of resources.world_sizes fits ({'; '.join(reasons)}); add a larger one, or set "
        f"engine.recompute in the base ({study.at('resources')})"
    )


def with_engine(config: Config, kind: str) -> Config:
    return replace(config, engine=replace(config.engine, kind=kind))  # type: ignore[arg-type]


def flops_of(cell: Cell) -> float:
    """Of a token."""
    return flops_per_token(cell.config.model, cell.config.data.seq_len)
