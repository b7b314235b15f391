"""Scales of a chart: where values lie between its edges, and round numbers for its ticks."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stablelm.observe.console import short_number

SMALLEST = 1e-290
"""Differences below are none: their quotients would not be exact."""


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
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        # Halves, for the difference of two large numbers may overflow.
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)

    def ticks(self, most: int = 6) -> list[Tick]:
        """At most so many round numbers."""
        powers = _powers(self.low, self.high, most) if self.log else []
        if len(powers) > 2:
            return [Tick(self.share(value), label(value, value)) for value in powers]
        values = _rounds(self.low, self.high, most)
        if max(abs(self.low), abs(self.high)) < 0.01:
            return [Tick(self.share(value), _scientific(value)) for value in values]
        step = abs(values[1] - values[0]) if len(values) > 1 else abs(self.high - self.low)
        return [Tick(self.share(value), label(value, step)) for value in values]


def axis(values: Sequence[float], *, log_from: float = math.inf, zero: bool = False) -> Axis:
    """An axis that holds all `values`, finite ones; logarithmic if all are positive and spread by a factor `log_from`.

    `zero`: it begins at 0 if no value is negative.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > log_from:
        return Axis(low * 0.95, high * 1.05, log=True)
    if zero and low > 0:
        low = 0.0
    if high - low <= max(SMALLEST, 1e-12 * max(abs(low), abs(high))):
        margin = 0.1 * abs(low) if abs(low) > SMALLEST else 1.0
        return Axis(low - margin, high + margin)
    margin = 0.04 * (high - low)
    return Axis(low if zero and low == 0 else low - margin, high + margin)


def label(value: float, step: float = 0.0) -> str:
    """A number in few characters; with `step` it differs from another one that is so far away."""
    size = abs(value)
    if size < step * 1e-9:
        return "0"
    if 1e4 <= size < 1e15:
        short = re.sub(r"\.0*(?=\D)|(\.\d*?)0+(?=\D)", r"\1", short_number(size))
        return f"-{short}" if value < 0 else short
    if size >= 1e15 or size < 1e-3:
        return _scientific(value)
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if step else f"{value:.4g}"


def figure(value: float) -> str:
    """Five digits, or all of those before the point."""
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"


def _scientific(value: float) -> str:
    """As 2.5e-4."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"


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
