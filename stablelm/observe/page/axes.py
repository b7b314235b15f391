"""Scales of a chart: where values lie between its edges, and round numbers for its ticks."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stablelm.observe.console import short_number


@dataclass(frozen=True)
class Tick:
    """A label at a share of the axis, 0 to 1."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, which differ; both are positive where it is logarithmic."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`; beyond them at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        # Halves, for the difference of two large numbers may overflow.
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)

    def ticks(self, most: int = 6) -> list[Tick]:
        """At most so many round numbers."""
        values = _powers(self.low, self.high, most) if self.log else []
        values = values if len(values) > 2 else _rounds(self.low, self.high, most)
        step = abs(values[1] - values[0]) if len(values) > 1 else abs(self.high - self.low)
        return [Tick(self.share(value), label(value, step)) for value in values]


def axis(values: Sequence[float], *, log_from: float = math.inf, zero: bool = False) -> Axis:
    """An axis that holds all `values`, finite ones; logarithmic if all are positive and spread by a factor `log_from`.

    `zero`: it begins at 0 if no value is negative.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low >= log_from:
        return Axis(low * 0.95, high * 1.05, log=True)
    if zero and low > 0:
        low = 0.0
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        return Axis(low - margin, high + margin)
    margin = 0.04 * (high - low)
    return Axis(low if zero and low == 0 else low - margin, high + margin)


def label(value: float, step: float = 0.0) -> str:
    """A number as short as it can be told apart from others that are `step` away."""
    if value == 0 or (step and abs(value) < step * 1e-9):
        return "0"
    size = abs(value)
    if 1e4 <= size < 1e15:
        return ("-" if value < 0 else "") + re.sub(r"\.0*(?=\D)|(\.\d*?)0+(?=\D)", r"\1", short_number(size))
    if size >= 1e15 or size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 4
    return f"{value:.{min(places, 12)}f}" if step else f"{value:.4g}"


def _rounds(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next((factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most), 20 * power)
    if step == 0 or not math.isfinite(low / step):
        return [low, high]
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, first + most + 1) if n * step <= high + 1e-9 * step]


def _powers(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; between few of them also their multiples by 2 and 5."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first >= 2:
        every = math.ceil((last - first + 1) / most)
        return [10.0**n for n in range(first, last + 1, every)]
    found = [factor * 10.0**n for n in range(first - 1, last + 1) for factor in (1, 2, 5)]
    return [value for value in found if low <= value <= high]
