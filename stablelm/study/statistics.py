"""How sure a comparison is: intervals with a pooled deviation, paired differences, the best rate."""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

POWER = 15.7
"""2 (z_.975 + z_.8)^2: runs an arm to see a difference of one standard deviation with power 80 % at 5 %."""
DRAWS = 2000


class MeanInterval(NamedTuple):
    """A mean with its interval; `half` is None where one value and no pooled deviation say nothing of it."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def pooled(cells: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation within cells and its degrees of freedom; None where no cell has two values."""
    squares = sum((value - statistics.fmean(cell)) ** 2 for cell in cells if len(cell) > 1 for value in cell)
    freedom = sum(len(cell) - 1 for cell in cells if len(cell) > 1)
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def interval(values: Sequence[float], spread: tuple[float, int] | None, level: float = 0.95) -> MeanInterval:
    """t-interval of the mean with a deviation pooled over cells."""
    mean = statistics.fmean(values)
    if spread is None:
        return MeanInterval(mean, None)
    sd, freedom = spread
    return MeanInterval(mean, t_quantile(0.5 + level / 2, freedom) * sd / math.sqrt(len(values)))


def smallest_difference(sd: float, seeds: int) -> float:
    """The difference of two means that so many seeds an arm show with power 80 %: n = 15.7 (sd / difference)^2."""
    return sd * math.sqrt(POWER / seeds)


def t_cumulative(t: float, freedom: int) -> float:
    """Student's distribution for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = 2 if freedom % 2 else 1
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for k in range(first, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    share = 0.5 + ((angle + sine * total) / math.pi if freedom % 2 else sine * total / 2)
    return min(1.0, max(0.0, share))


def t_quantile(share: float, freedom: int) -> float:
    """By bisection; `share` strictly between 0 and 1."""
    low, high = -1.0, 1.0
    while t_cumulative(high, freedom) < share:
        high *= 2
    while t_cumulative(low, freedom) > share:
        low *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cumulative(middle, freedom) < share else (low, middle)
    return (low + high) / 2


class Vertex(NamedTuple):
    """The lowest point of a parabola in the logarithm of the rate, with the interval that redrawn noise gives."""

    rate: float
    loss: float
    low: float
    high: float


def vertex(losses: Mapping[float, float], sd: float | None, seed: int = 0) -> Vertex | None:
    """Through the three to five finite points around the best rate; None unless convex with its lowest point inside.

    `sd`: the noise of a loss, by which the interval of 95 % redraws the points; None: no interval, low = high = rate.
    """
    points = around(losses)
    found = _lowest(points)
    if found is None:
        return None
    if not sd:
        return Vertex(*found, found[0], found[0])
    draw, rates = random.Random(seed), []
    for _ in range(DRAWS):
        moved = _lowest([(x, y + draw.gauss(0.0, sd)) for x, y in points])
        # A draw without a lowest point inside says that the best rate may be the end that is lower.
        rates.append(moved[0] if moved else math.exp(min(points, key=lambda p: p[1] + draw.gauss(0.0, sd))[0]))
    rates.sort()
    return Vertex(*found, rates[round(0.025 * (DRAWS - 1))], rates[round(0.975 * (DRAWS - 1))])


def around(losses: Mapping[float, float], most: int = 5) -> list[tuple[float, float]]:
    """Finite points (ln rate, loss) around the best one: up to two on each side."""
    finite = sorted((math.log(rate), loss) for rate, loss in losses.items() if math.isfinite(loss))
    if not finite:
        return []
    best = min(range(len(finite)), key=lambda place: finite[place][1])
    side = most // 2
    return finite[max(0, best - side) : best + side + 1]


def _lowest(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if len(points) < 3:
        return None
    import numpy as np

    x, y = np.array(points).T
    centre = x.mean()
    a, b, c = np.polyfit(x - centre, y, 2)
    if a <= 0:
        return None
    place = -b / (2 * a)
    if not x.min() <= place + centre <= x.max():
        return None
    return float(np.exp(place + centre)), float(c - b * b / (4 * a))


class Fit(NamedTuple):
    """y = intercept + slope x, with the half width of the slope's interval, None for two points."""

    slope: float
    intercept: float
    half: float | None

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def line(points: Sequence[tuple[float, float]], level: float = 0.95) -> Fit | None:
    """Least squares; None for fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    found, freedom = Fit(slope, mean_y - slope * mean_x, None), len(points) - 2
    if freedom < 1:
        return found
    rest = sum((y - found.at(x)) ** 2 for x, y in points) / freedom
    return found._replace(half=t_quantile(0.5 + level / 2, freedom) * math.sqrt(rest / spread))


class PairedDifference(NamedTuple):
    """One arm less another, paired by seed; `p` two-sided, None with fewer than two pairs."""

    mean: float
    half: float | None
    p: float | None


def paired(first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95) -> PairedDifference | None:
    """By seed, where both have it; None where they share none."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None, None)
    error, freedom = statistics.stdev(differences) / math.sqrt(len(differences)), len(differences) - 1
    if error == 0:
        return PairedDifference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return PairedDifference(
        mean, t_quantile(0.5 + level / 2, freedom) * error, 2 * (1 - t_cumulative(abs(mean) / error, freedom))
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979): the smallest times their number, the next times one less, never decreasing."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - place)))
        adjusted[name] = largest
    return adjusted


def share_best(
    draws: Mapping[str, Callable[[random.Random], float]], seed: int = 0, count: int = DRAWS
) -> dict[str, float]:
    """How often each has the lowest value when all are drawn again; a tie is shared."""
    draw, won = random.Random(seed), dict.fromkeys(draws, 0.0)
    for _ in range(count):
        values = {name: one(draw) for name, one in draws.items()}
        lowest = min(values.values())
        best = [name for name, value in values.items() if value == lowest]
        for name in best:
            won[name] += 1 / len(best) / count
    return won
