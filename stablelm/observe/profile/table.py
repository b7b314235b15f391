"""The table of a profile: seconds of a step by part and by operator, how near to the limit, and what to try."""

import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from stablelm.config.schema import Config
from stablelm.methods.sizes import flops_per_token
from stablelm.model.linear import make_dtypes
from stablelm.observe.interval_metrics import peak_flops
from stablelm.observe.profile import parts
from stablelm.observe.profile.timeline import Timeline

OPERATORS = 12
MEASURED = 1024
"""Rows and columns of the matmul that stands for the limit where no data sheet does."""


@dataclass(frozen=True)
class Limit:
    """FLOP/s that matmuls could reach, and in words where that is from."""

    flops_per_second: float
    words: str


@dataclass(frozen=True)
class Profile:
    """Means of a traced step on one rank: seconds by part and by operator, calls by operator, matmuls."""

    first: int
    last: int
    rank: int
    world_size: int
    device: str
    seconds: float
    parts: dict[str, float]
    operators: dict[str, tuple[float, float]]
    """Seconds and calls."""
    matmul_seconds: float
    matmul_flops: float
    model_flops: float
    limit: Limit

    def share(self, *names: str) -> float:
        """Of the step's time, that of these parts."""
        return sum(self.parts.get(name, 0.0) for name in names) / self.seconds

    @property
    def matmul_share(self) -> float:
        return self.matmul_seconds / self.seconds

    @property
    def matmul_limit_share(self) -> float:
        """FLOP/s of the matmuls while they run, of the limit; 0 without matmuls, as where the trace has no shapes."""
        rate = self.matmul_flops / self.matmul_seconds if self.matmul_seconds else 0.0
        return rate / self.limit.flops_per_second

    @property
    def model_limit_share(self) -> float:
        """FLOPs of the model, recompute not counted, in the whole step, of the limit."""
        return self.model_flops / self.seconds / self.limit.flops_per_second


def summarise(
    timeline: Timeline, first: int, last: int, config: Config, device: torch.device, rank: int, world_size: int
) -> Profile:
    """The means over the timeline's steps, `first` to `last`."""
    steps = len(timeline.steps)
    by_part, by_operator = Counter[str](), Counter[str]()
    for start, stop, part, operator in timeline.stretches:
        by_part[part] += stop - start  # pyright: ignore[reportArgumentType]
        by_operator[operator] += stop - start  # pyright: ignore[reportArgumentType]
    per_step = 1e-6 / steps
    sizes = config.train.batch_sizes
    rows = (sizes.before(last) - sizes.before(first - 1)) / (last - first + 1)
    return Profile(
        first=first,
        last=last,
        rank=rank,
        world_size=world_size,
        device=device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
        seconds=sum(stop - start for start, stop in timeline.steps) * per_step,
        parts={name: by_part[name] * per_step for name in parts.ORDER if by_part[name]},
        operators={name: (spent * per_step, timeline.calls[name] / steps) for name, spent in by_operator.most_common()},
        matmul_seconds=timeline.matmul_time * per_step,
        matmul_flops=timeline.flops / steps,
        model_flops=flops_per_token(config.model, config.data.seq_len) * rows * config.data.seq_len / world_size,
        limit=limit_of(device, config),
    )


def limit_of(device: torch.device, config: Config) -> Limit:
    """The data sheet's bf16 peak of a known GPU; else the best of three matmuls in the run's own precision, now."""
    if peak := peak_flops(device):
        return Limit(peak, f"{peak / 1e12:.0f} TFLOP/s of the data sheet")
    a = torch.ones(MEASURED, MEASURED, dtype=make_dtypes(str(config.train.precision), "fp32").compute, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    rate = 2.0 * MEASURED**3 / best
    return Limit(rate, f"{rate / 1e9:.1f} GFLOP/s that a {MEASURED} x {MEASURED} matmul reaches here")


def as_text(profile: Profile, suggestions: list[str]) -> str:
    """The table as people read it."""
    which = f"step {profile.last}" if profile.first == profile.last else f"steps {profile.first} to {profile.last}"
    lines = [
        f"profile of {which}, rank {profile.rank} of {profile.world_size}, {profile.device}: "
        f"{1000 * profile.seconds:.1f} ms a step",
        "",
        f"{'part of the step':<30}{'ms':>10}{'share':>9}",
        *(_row(name, spent, profile.seconds) for name, spent in profile.parts.items()),
        "",
        f"{'operator':<52}{'ms':>10}{'share':>9}{'calls':>8}",
        *(
            f"{_row(name, spent, profile.seconds, 52)}{calls:8.0f}"
            for name, (spent, calls) in list(profile.operators.items())[:OPERATORS]
        ),
        "",
        f"matmuls take {profile.matmul_share:.0%} of the step and run at {profile.matmul_limit_share:.0%} of the "
        f"{profile.limit.words};",
        f"the model's FLOPs, recompute not counted, are {profile.model_limit_share:.0%} of what that limit allows in a "
        "step.",
        "A trace slows small operators down: compare shares, and take speeds from a run without one.",
        "",
        "What to try:",
        *(textwrap.fill(f"- {sentence}", width=110, subsequent_indent="  ") for sentence in suggestions),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, seconds: float, step: float, width: int = 30) -> str:
    shown = name if len(name) < width else name[: width - 4] + "..."
    return f"{shown:<{width}}{1000 * seconds:10.2f}{seconds / step:9.1%}"


def as_json(profile: Profile, suggestions: list[str]) -> dict[str, Any]:
    """The same as plain values; seconds of a mean step."""
    return {
        "first_step": profile.first,
        "last_step": profile.last,
        "rank": profile.rank,
        "world_size": profile.world_size,
        "device": profile.device,
        "step_seconds": profile.seconds,
        "parts": profile.parts,
        "operators": {name: {"seconds": spent, "calls": calls} for name, (spent, calls) in profile.operators.items()},
        "matmul_seconds": profile.matmul_seconds,
        "matmul_flops": profile.matmul_flops,
        "model_flops": profile.model_flops,
        "limit_flops_per_second": profile.limit.flops_per_second,
        "suggestions": suggestions,
    }
