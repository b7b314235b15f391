"""The largest number of layers that fits at a plan's width, engine and batch."""

import math
from dataclasses import dataclass

from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.engine.peak_memory.rank_memory import Layout
from stablelm.errors import ConfigError
from stablelm.model.memory import layer_memory
from stablelm.plan.request import PlanRequest

MOST_LAYERS = 4096
MEMORY = "memory"


@dataclass(frozen=True)
class LargestDepth:
    """`layers` fit in `peak` bytes per GPU, one more does not: `limit` says why. No layers: not even one fits."""

    layers: int
    limit: str
    peak: int


def largest_depth(request: PlanRequest, layout: Layout, peak: float, scale: float) -> LargestDepth:
    """Searches by regula falsi, because the peak is nearly linear in the depth; `peak`: bytes at the depth asked.

    `scale`: bytes of the dry run over those estimated at the depth asked.
    """
    known = {request.config.model.n_layers: peak}
    low, high, limit = 0, MOST_LAYERS + 1, f"the search, which ends at {MOST_LAYERS:,} layers"

    def note(n_layers: int, needed: float, reason: str = MEMORY) -> None:
        nonlocal low, high, limit
        if needed <= request.usable:
            low = max(low, n_layers)
        elif n_layers < high:
            high, limit = n_layers, reason

    ruled_out = False
    note(request.config.model.n_layers, peak)
    while high - low > 1:
        guess = (low + high) // 2 if ruled_out else _guess(known, request.usable)
        n_layers = min(high - 1, max(low + 1, guess))
        try:
            known[n_layers] = scale * _estimate(request, layout, n_layers)
            note(n_layers, known[n_layers])
        except ConfigError as error:
            ruled_out = True
            note(n_layers, math.inf, str(error))
    return LargestDepth(low, limit, round(known.get(low, 0)))


def _estimate(request: PlanRequest, layout: Layout, n_layers: int) -> int:
    """Estimated peak bytes per GPU at another depth; ConfigError where a rule forbids it.

    Where all layers are alike no model of that depth is built.
    """
    asked, config = request.config, request.at_depth(n_layers).config
    measured = layer_memory.measure(asked)
    if not measured.alike or asked.model.n_layers < 2:
        return estimate.peak(config, rank_memory.parameters(config), layout).total()
    listed = rank_memory.at_depth(rank_memory.parameters(asked), config.model.axes.stack.distinct(config.model))
    return estimate.peak(config, listed, layout, measured.with_more(n_layers - asked.model.n_layers)).total()


def _guess(known: dict[int, float], usable: float) -> int:
    """Where the line through the two known depths nearest to the limit meets it."""
    if len(known) == 1:
        (depth,) = known
        return 2 * depth if known[depth] <= usable else depth // 2
    first, second = sorted(sorted(known, key=lambda depth: abs(known[depth] - usable))[:2])
    slope = max((known[second] - known[first]) / (second - first), 1.0)
    return int(first + (usable - known[first]) / slope)
