"""Figures over steps in bounded memory, however long the run is: of one number, and of one number for each layer.

Neighbours are merged in pairs whenever there are too many; a curve keeps the extremes of what it merged.
"""

import math
from dataclasses import dataclass, field

import numpy as np

POINTS = 600
"""A curve has between so many points and twice as many, if it was given that many values."""
COLUMNS = 256
"""The same of a map of layers."""
NOTED = 200
"""Steps with values that are not finite are noted up to this number."""


@dataclass(slots=True)
class Point:
    """Neighbouring values of a curve, of which those that are not finite do not count."""

    first: int
    last: int
    count: int
    total: float
    low: float
    low_at: int
    high: float
    high_at: int

    @property
    def mean(self) -> float:
        """NaN where no value was finite."""
        return self.total / self.count if self.count else math.nan

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2

    def merge(self, later: "Point") -> None:
        self.last = later.last
        self.count += later.count
        self.total += later.total
        if later.low < self.low:
            self.low, self.low_at = later.low, later.low_at
        if later.high > self.high:
            self.high, self.high_at = later.high, later.high_at


@dataclass(slots=True)
class Curve:
    """A number at steps in ascending order; a step at or before the last one replaces all from there on."""

    points: list[Point] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    latest: float = math.nan
    _width: int = 1

    def add(self, step: int, value: float) -> None:
        points = self.points
        if points and step <= points[-1].last:
            self.forget(step)
        self.latest = value
        if math.isfinite(value):
            point = Point(step, step, 1, value, value, step, value, step)
        else:
            point = Point(step, step, 0, 0.0, math.inf, step, -math.inf, step)
            if len(self.not_finite) < NOTED:
                self.not_finite.append(step)
        if points and points[-1].first // self._width == step // self._width:
            points[-1].merge(point)
            return
        points.append(point)
        while len(self.points) > 2 * POINTS:
            self._halve()

    def forget(self, step: int) -> None:
        """Drops what came at `step` and later, as far as it was not merged with earlier values."""
        while self.points and self.points[-1].first >= step:
            self.points.pop()
        if self.points:
            self.points[-1].last = min(self.points[-1].last, step - 1)
            self.latest = self.points[-1].mean
        while self.not_finite and self.not_finite[-1] >= step:
            self.not_finite.pop()

    def lowest(self) -> Point | None:
        """The point with the smallest finite value."""
        return min((point for point in self.points if point.count), key=lambda point: point.low, default=None)

    def highest(self) -> Point | None:
        """The point with the largest finite value."""
        return max((point for point in self.points if point.count), key=lambda point: point.high, default=None)

    def _halve(self) -> None:
        self._width *= 2
        merged = self.points[:1]
        for point in self.points[1:]:
            if merged[-1].first // self._width == point.first // self._width:
                merged[-1].merge(point)
            else:
                merged.append(point)
        self.points = merged


@dataclass(slots=True)
class Column:
    """Sum over `count` neighbouring measurements of a number for each layer, float64 (layers,)."""

    first: int
    last: int
    count: int
    total: np.ndarray

    def merge(self, later: "Column") -> None:
        self.last = later.last
        self.count += later.count
        size = max(len(self.total), len(later.total))
        self.total = _padded(self.total, size) + _padded(later.total, size)


@dataclass(slots=True)
class LayerMap:
    """A number for each layer, measured at steps in ascending order; as `Curve` for a step that comes again."""

    columns: list[Column] = field(default_factory=list)
    _together: int = 1

    def add(self, step: int, values: np.ndarray) -> None:
        """values: float64 (layers,), NaN where there is none."""
        if self.columns and step <= self.columns[-1].last:
            self.forget(step)
        column = Column(step, step, 1, values)
        if self.columns and self.columns[-1].count < self._together:
            self.columns[-1].merge(column)
            return
        self.columns.append(column)
        if len(self.columns) > 2 * COLUMNS:
            self._together *= 2
            for early, late in zip(self.columns[::2], self.columns[1::2], strict=False):
                early.merge(late)
            self.columns = self.columns[::2]

    def forget(self, step: int) -> None:
        """Drops what came at `step` and later, as far as it was not merged with earlier measurements."""
        while self.columns and self.columns[-1].first >= step:
            self.columns.pop()
        if self.columns:
            self.columns[-1].last = min(self.columns[-1].last, step - 1)

    def means(self) -> np.ndarray:
        """float64 (layers, columns); NaN where a measurement is missing or not finite."""
        size = max((len(column.total) for column in self.columns), default=0)
        with np.errstate(invalid="ignore", over="ignore"):
            rows = [_padded(column.total, size) / column.count for column in self.columns]
        return np.stack(rows, axis=1) if rows else np.empty((0, 0))


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=np.nan) if len(values) < size else values
