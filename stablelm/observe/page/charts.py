"""The geometry of charts: curves and maps of layers as paths and pictures that fill a box of any size."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stablelm.observe.page.axes import Axis, Tick, axis, figure, label
from stablelm.observe.page.curves import Curve, LayerMap, Point

SIZE = 10_000
"""Paths are drawn in a square of this side, which the page stretches."""
DOTS = 32
"""A curve of at most so many points gets a dot for each."""
COLOURS = 6
# Of viridis, from low to high; the last entry of a palette is for values that are missing or not finite.
STOPS = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
         (110, 206, 88), (181, 222, 43), (253, 231, 37))  # fmt: skip
MISSING = (128, 128, 128)
LEVELS = 255


@dataclass(frozen=True)
class Dot:
    x: int
    y: int
    words: str


@dataclass(frozen=True)
class Line:
    """A curve as SVG paths: its means, and the band between its extremes ('' where it has none)."""

    name: str
    colour: int
    path: str
    band: str
    dots: list[Dot]
    words: str


@dataclass(frozen=True)
class Mark:
    """A vertical line at a share of the x axis."""

    at: float
    label: str
    tone: str
    words: str


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    at: float
    words: str


@dataclass(frozen=True)
class Chart:
    """`wide`: takes the whole width of the page; `log`: whether the y axis is logarithmic."""

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    x_name: str = "step"
    wide: bool = False
    log: bool = False
    marks: list[Mark] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)


@dataclass(frozen=True)
class Heatmap:
    """Steps from left to right, layers from the bottom up; `png`: a data URI of a pixel for each value."""

    title: str
    note: str
    png: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    scale: list[str]
    """What the lowest, the middle and the highest colour mean."""
    words: str
    header: list[str]
    rows: list[list[str]]
    profile: Chart


def chart(
    title: str,
    curves: Sequence[tuple[str, list[Point]]],
    x: Axis,
    *,
    unit: str = "",
    scale: float = 1.0,
    log_from: float = math.inf,
    zero: bool = False,
    x_name: str = "step",
    wide: bool = False,
    marks: Sequence[Mark] = (),
    level: tuple[str, float] | None = None,
    means_only: bool = False,
) -> Chart | None:
    """A chart of points by name; values are multiplied by `scale`. None where nothing is finite.

    `level`: name and value of a horizontal line. `means_only`: extremes may lie beyond the y axis.
    """
    scaled = [(name, [_scaled(point, scale) for point in points]) for name, points in curves]
    finite = [point for _, points in scaled for point in points if point.count]
    values = [v for p in finite for v in ((p.mean,) if means_only else (p.low, p.high)) if abs(v) < 1e300]
    if not values:
        return None
    y = axis(values + ([level[1]] if level else []), log_from=log_from, zero=zero)
    lines = [_line(name, number % COLOURS, points, x, y, x_name) for number, (name, points) in enumerate(scaled)]
    levels = [Level(y.share(level[1]), f"{level[0]} {label(level[1])}")] if level else []
    return Chart(
        title, unit, x.ticks(), y.ticks(7), lines, x_name, wide, y.log, list(marks), levels
    )  # fmt: skip


def _scaled(point: Point, scale: float) -> Point:
    total, low, high = point.total * scale, point.low * scale, point.high * scale
    return Point(point.first, point.last, point.count, total, low, point.low_at, high, point.high_at)


def _line(name: str, colour: int, points: list[Point], x: Axis, y: Axis, x_name: str) -> Line:
    def place(step: float, value: float) -> str:
        return f"{round(x.share(step) * SIZE)} {round((1 - y.share(value)) * SIZE)}"

    runs = _runs(points)
    path = "".join("M" + "L".join(place(point.middle, point.mean) for point in run) for run in runs)
    merged = any(point.count > 1 for point in points)
    band = "".join(
        "M" + "L".join([place(p.middle, p.high) for p in run] + [place(p.middle, p.low) for p in reversed(run)]) + "Z"
        for run in runs
        if merged
    )
    finite = [point for run in runs for point in run]
    dots = [
        Dot(
            round(x.share(p.middle) * SIZE),
            round((1 - y.share(p.mean)) * SIZE),
            f"{x_name} {p.last:,}: {figure(p.mean)}",
        )
        for p in (finite if len(finite) <= DOTS else [])
    ]
    return Line(name, colour, path, band, dots, _words(name, finite, x_name))


def _runs(points: list[Point]) -> list[list[Point]]:
    """Neighbours that are connected: values that are not finite part them."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point.count and math.isfinite(point.mean):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _words(name: str, finite: list[Point], x_name: str) -> str:
    """What a reader who does not see the curve is given."""
    if not finite:
        return f"{name}: nothing finite"
    low = min(finite, key=lambda point: point.low)
    high = max(finite, key=lambda point: point.high)
    first, last = finite[0], finite[-1]
    return (
        f"{name}: {figure(first.mean)} at {x_name} {first.first:,}, {figure(last.mean)} at {x_name} {last.last:,}; "
        f"lowest {figure(low.low)} at {low.low_at:,}, highest {figure(high.high)} at {high.high_at:,}"
    )


def heatmap(title: str, note: str, layers: LayerMap, first_layer: int) -> Heatmap | None:
    """None where nothing is finite."""
    means, columns = layers.means(), layers.columns
    inner = means[1:] if first_layer == 0 and len(means) > 2 else means  # the embedding is of another size
    finite = inner[np.isfinite(inner)]
    if not finite.size:
        return None
    low, high = np.percentile(finite, (0.5, 99.5))
    scale = Axis(float(low), float(high), log=bool(finite.min() > 0 and high / low > 20))
    if high <= low:
        scale = Axis(float(low) - 1, float(low) + 1)
    names = [f"{column.last:,}" for column in columns]
    rows = sorted({round(share * (len(means) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}, reverse=True)
    some = sorted({round(share * (len(columns) - 1)) for share in (0, 0.5, 1)})
    depth = Axis(first_layer - 0.5, first_layer + len(means) - 0.5)
    merged = max(column.count for column in columns)
    return Heatmap(
        title=title,
        note=note + (f" A column is the mean of up to {merged} measurements." if merged > 1 else ""),
        png=_png(means, scale),
        x_ticks=_column_ticks([column.last for column in columns]),
        y_ticks=[tick for tick in depth.ticks(5) if "." not in tick.label],
        scale=[label(scale.low), label(_middle(scale)), label(scale.high)],
        words=_extremes(means, names, first_layer),
        header=[f"step {names[column]}" for column in some],
        rows=[[str(row + first_layer), *(_figure(means[row, column]) for column in some)] for row in rows],
        profile=_profile(title, means, names, first_layer),
    )


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _middle(scale: Axis) -> float:
    return math.sqrt(scale.low * scale.high) if scale.log else scale.low / 2 + scale.high / 2


def _extremes(means: np.ndarray, names: list[str], first: int) -> str:
    words = []
    for word, at in (("lowest", np.nanargmin(means)), ("highest", np.nanargmax(means))):
        layer, column = np.unravel_index(at, means.shape)
        words.append(f"{word} {means[layer, column]:.4g} at layer {layer + first}, step {names[column]}")
    missing = int((~np.isfinite(means)).sum())
    return "; ".join(words) + (f"; {missing} values are missing or not finite" if missing else "")


def _column_ticks(steps: list[int]) -> list[Tick]:
    """At round steps, where columns of equal width have them."""
    if len(steps) == 1:
        return [Tick(0.5, label(steps[0]))]
    places = (np.arange(len(steps)) + 0.5) / len(steps)
    x = Axis(steps[0], steps[-1])
    ticks = [(steps[0] + tick.at * (steps[-1] - steps[0]), tick.label) for tick in x.ticks()]
    return [Tick(float(np.interp(step, steps, places)), words) for step, words in ticks]


def _profile(title: str, means: np.ndarray, names: list[str], first: int) -> Chart:
    """Over depth, at the first and the last measurement."""
    chosen = [0] if means.shape[1] == 1 else [0, means.shape[1] - 1]
    curves: list[tuple[str, list[Point]]] = []
    for column in chosen:
        curve = Curve()
        for layer, value in enumerate(means[:, column].tolist(), first):
            curve.add(layer, value)
        curves.append((f"step {names[column]}", curve.points))
    x = Axis(first, max(first + len(means) - 1, first + 1))
    return chart(f"{title} over depth", curves, x, log_from=20, x_name="layer") or Chart(title, "", [], [], [])


def _png(means: np.ndarray, scale: Axis) -> str:
    """A data URI; a pixel for each value, the last layer at the top."""
    from PIL import Image

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        low, high, places = scale.low, scale.high, means
        if scale.log:
            low, high, places = math.log(low), math.log(high), np.log(means)
        shares = np.clip((places - low) / (high - low), 0, 1)
    levels = np.where(np.isfinite(means), np.nan_to_num(shares) * (LEVELS - 1), LEVELS).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(levels[::-1]))
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def palette() -> np.ndarray:
    """uint8 (256, 3): `LEVELS` colours from low to high, and that of missing values."""
    places = np.linspace(0, len(STOPS) - 1, LEVELS)
    colours = np.stack([np.interp(places, range(len(STOPS)), channel) for channel in zip(*STOPS, strict=True)], axis=1)
    return np.concatenate([colours, [MISSING]]).round().astype(np.uint8)
