"""Figures of every layer as images of depth and step, in place of a curve for each layer."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = re.compile(r"(layer|attention|sigma)/(\d{4,})/(.+)")
COLUMNS = 512
"""Measured steps that an image shows; beyond them every second one is left out."""
GROWTH = 1.5
"""Images are drawn again when there are so many times the measurements of the last ones: about 20 times a run."""


def is_of_layer(name: str) -> bool:
    """Whether a metric is one layer's figure."""
    return NAME.fullmatch(name) is not None


class Heatmaps:
    """Collects the records of measurements; memory and the number of images stay bounded in runs of any length."""

    def __init__(self) -> None:
        self._columns: dict[int, dict[str, np.ndarray]] = {}
        self._drawn = self._seen = 0
        self._stride = 1

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in a record that has figures of layers; any other changes nothing."""
        by_name: dict[str, dict[int, float]] = {}
        for name, value in record.items():
            if found := NAME.fullmatch(name):
                by_name.setdefault(f"{found[1]}/{found[3]}", {})[int(found[2])] = value
        if not by_name:
            return
        if self._seen % self._stride == 0:
            self._columns[record["step"]] = {kind: _column(figures) for kind, figures in by_name.items()}
        self._seen += 1
        if len(self._columns) > COLUMNS:
            self._columns = dict(sorted(self._columns.items())[::2])
            self._stride *= 2

    def forget_after(self, step: int) -> None:
        """Drops what was measured after a step that the run returned to."""
        self._columns = {at: column for at, column in self._columns.items() if at <= step}

    @property
    def due(self) -> bool:
        """Whether enough was added since the last drawing."""
        return self._seen >= max(self._drawn + 1, GROWTH * self._drawn)

    @property
    def pending(self) -> bool:
        """Whether anything was added since the last drawing."""
        return self._seen > self._drawn

    @property
    def last_step(self) -> int:
        return max(self._columns, default=0)

    def draw(self) -> Iterator[tuple[str, "Figure"]]:
        """Name and image of each kind of figure, such as `layer/stream_rms` and `sigma/query`."""
        self._drawn = self._seen
        steps = sorted(self._columns)
        for kind in dict.fromkeys(kind for step in steps for kind in self._columns[step]):
            columns = [self._columns[step].get(kind, np.empty(0)) for step in steps]
            depth = max(map(len, columns))
            # (depth, steps)
            table = np.stack([np.pad(c, (0, depth - len(c)), constant_values=np.nan) for c in columns], axis=1)
            yield kind, draw(np.array(steps), table)


def _column(figures: Mapping[int, float]) -> np.ndarray:
    """Values by index of the layer, NaN where there is none."""
    column = np.full(max(figures) + 1, np.nan)
    column[list(figures)] = list(figures.values())
    return column


def draw(steps: np.ndarray, table: np.ndarray) -> "Figure":
    """The image of a table (depth, steps) of values; steps: (steps,), rising."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8))
    axes = figure.add_subplot()
    # A layout that is computed costs as much time as the drawing.
    figure.subplots_adjust(left=0.1, right=1.0, bottom=0.17, top=0.96)
    first = int(np.isfinite(table).any(axis=1).argmax())
    depths = np.arange(first, len(table) + 1) - 0.5
    # Not finite: left white.
    image = axes.pcolorfast(_edges(steps), depths, np.ma.masked_invalid(table[first:]), norm=_norm(table))
    axes.set_xlabel("step", fontsize=15)
    axes.set_ylabel("layer (0: embedding)" if first == 0 else "layer", fontsize=15)
    axes.tick_params(labelsize=13)
    axes.locator_params(integer=True, nbins=6)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=13)
    return figure


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns, halfway between steps."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _norm(table: np.ndarray):
    """Logarithmic colours for what is positive and spans more than a factor of 100."""
    from matplotlib.colors import LogNorm, Normalize

    finite = table[np.isfinite(table)]
    if not finite.size:
        return Normalize(0, 1)
    low, high = finite.min(), finite.max()
    return LogNorm(low, high) if low > 0 and high > 100 * low else Normalize(low, high)
