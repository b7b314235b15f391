"""The search for a cell's best learning rate: from the losses so far to the rates to try next, or an end.

A function of the results alone, asked again after each batch of rates: the path is the same however the runs were
spread over jobs, killed or continued. Rates are tried in factors, because losses are nearly quadratic in their
logarithm around the best one.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from stablelm.study.study_file import LearningRates

DIGITS = 4  # of a rate
SLACK = 1e-3  # of a factor, for rounded rates


class Next(NamedTuple):
    """Rates to try, all of them before the search goes on."""

    rates: tuple[float, ...]


class Best(NamedTuple):
    """The best rate, with a worse one on both sides within the factor that was asked for."""

    rate: float


class Edge(NamedTuple):
    """The search ended without a best rate; `rate` has the lowest loss so far, None where all losses are infinite."""

    rate: float | None
    why: str


def search(rates: LearningRates, losses: Mapping[float, float]) -> Next | Best | Edge:
    """What follows from the mean loss of each rate tried so far, infinite for one that diverged."""
    first = rates.fixed or rates.start
    if missing := tuple(rate for rate in first if rate not in losses):
        return Next(missing)
    tried = sorted(losses)
    finite = [rate for rate in tried if math.isfinite(losses[rate])]
    if rates.fixed is not None:
        if not finite:
            return Edge(None, "every rate of lr.fixed diverged")
        return Best(min(finite, key=lambda rate: losses[rate]))
    # Of equal losses the smaller rate is the best.
    best = min(finite, key=lambda rate: losses[rate]) if finite else None
    if best is None or best in (tried[0], tried[-1]):
        wanted = _widened(rates, tried, best)
        if isinstance(wanted, Edge):
            return wanted
    else:
        wanted = _refined(rates, losses, best)
        if not wanted:
            return Best(best)
    room = rates.max_runs - len(tried)
    return Next(wanted[:room]) if room > 0 else Edge(best, f"lr.max_runs={rates.max_runs} rates were tried")


def replay(
    rates: LearningRates, loss: Callable[[float], float | None]
) -> tuple[dict[float, float], Next | Best | Edge]:
    """The search from its beginning: the losses on its path, and where it stands.

    `loss`: of a rate, None where it is not known yet. A batch of rates counts when all of it is known: what a part of
    it says leads nowhere.
    """
    known: dict[float, float] = {}
    while isinstance(found := search(rates, known), Next):
        batch = {rate: value for rate in found.rates if (value := loss(rate)) is not None}
        if len(batch) < len(found.rates):
            return known | batch, found
        known |= batch
    return known, found


def _widened(rates: LearningRates, tried: list[float], best: float | None) -> tuple[float, ...] | Edge:
    """One rate beyond the end at which the best one lies; where all diverged, below the smallest."""
    low, high = rates.bounds
    down = best is None or best == tried[0]
    sides = [("below", tried[0] / rates.expand)] if down else [("above", tried[-1] * rates.expand)]
    if best is not None and len(tried) == 1:
        sides = [("below", tried[0] / rates.expand), ("above", tried[0] * rates.expand)]
    inside = tuple(rounded(rate) for _, rate in sides if low * (1 - SLACK) <= rate <= high * (1 + SLACK))
    if inside:
        return inside
    what = "every rate diverged" if best is None else f"the best rate {best:g} is the last one"
    return Edge(best, f"{what} {'above' if down else 'below'} lr.bounds[{0 if down else 1}]={rates.bounds[not down]:g}")


def _refined(rates: LearningRates, losses: Mapping[float, float], best: float) -> tuple[float, ...]:
    """The middles of those gaps beside the best rate that are wider than asked for, the better neighbour's first."""
    tried = sorted(losses)
    place = tried.index(best)
    beside = sorted((tried[place - 1], tried[place + 1]), key=lambda rate: losses[rate])
    wide = [rate for rate in beside if max(rate / best, best / rate) > rates.refine * (1 + SLACK)]
    return tuple(rounded(math.sqrt(rate * best)) for rate in wide)


def rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")
