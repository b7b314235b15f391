"""The figures of a report, by name: marks and lines tell arms apart, not colour alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stablelm.study import results
from stablelm.study.report.findings import CellFinding, Findings, outcomes, transfer
from stablelm.study.statistics import around

# Okabe and Ito's colours, told apart by all common kinds of colour vision; yellow is too faint on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKS = "osD^vP*X<>h"
DASHES = ("-", "--", "-.", ":")
SIGNALS = (("stream_rms", "stream_variance", 0.5), ("grad_norm", "gradient_norm", 1.0))
"""A run's metric, what `study.measure` has of the start, and the power that makes them equal."""
OUTCOME_MARKS = {results.TRAINED: "●", results.SPIKED: "▲", results.NOTHING_LEARNT: "○", results.NOT_FINITE: "✕"}
OUTCOME_SHADES = {results.TRAINED: 0, results.SPIKED: 1, results.NOTHING_LEARNT: 2, results.NOT_FINITE: 3}
STYLE: Any = {
    "svg.hashsalt": "stablelm",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def figures(found: Findings) -> Iterator[tuple[str, str, Figure]]:
    """Name, title and figure of each that the results allow; made one at a time."""
    made: tuple[tuple[str, str, Callable[[Findings, str], Figure | None]], ...] = (
        ("loss-by-depth", "Validation loss against depth", loss_by_depth),
        ("loss-by-rate", "Validation loss against learning rate", loss_by_rate),
        ("outcomes", "Outcome of every learning rate", outcome_map),
        ("rate-by-depth", "Best learning rate against depth", rate_by_depth),
        ("use-of-layers", "Use of layers", use_of_layers),
        ("signal", "Signal and gradient by layer", signal),
        ("cost", "Loss against cost", cost),
        ("curves", "Training loss", curves),
    )
    for column in found.columns:
        suffix = "" if len(found.columns) == 1 else f"-{found.columns.index(column) + 1}"
        for name, title, draw in made:
            with rc_context(STYLE):
                figure = draw(found, column)
                if figure is not None:
                    yield name + suffix, f"{title}, {column}" if suffix else title, figure


def look(found: Findings, arm: str) -> dict[str, Any]:
    """Colour, mark and line of an arm."""
    place = found.arms.index(arm)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[place % len(MARKS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }


def _cells(found: Findings, arm: str, column: str) -> list[CellFinding]:
    return [cell for depth in found.depths if (cell := found.at(arm, depth, column))]


def _canvas(
    width: float = 6.4, height: float = 4.0, rows: int = 1, columns: int = 1, **more: Any
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _depth_axis(axes: Any, found: Findings) -> None:
    axes.set_xscale("log")
    axes.set_xlim(found.depths[0] / 1.25, found.depths[-1] * 1.25)
    axes.set_xticks(found.depths, [str(depth) for depth in found.depths])
    axes.minorticks_off()
    axes.set_xlabel("layers")


def _plain_ticks(axis: Any) -> None:
    """1 and 3 of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def loss_by_depth(found: Findings, column: str) -> Figure | None:
    """Means and intervals of confirmed losses; a dot a seed; the bigram model, which says what is worth comparing."""
    figure, ((axes,),) = _canvas()
    drawn = False
    for arm in found.arms:
        cells = [(cell, mean) for cell in _cells(found, arm, column) if (mean := found.mean(cell)) is not None]
        if not cells:
            continue
        drawn, shift = True, 1 + 0.02 * (found.arms.index(arm) - (len(found.arms) - 1) / 2)
        x = [cell.depth * shift for cell, _ in cells]
        axes.errorbar(
            x, [mean.mean for _, mean in cells], [mean.half or 0.0 for _, mean in cells],
            label=arm, capsize=3, markersize=5, linewidth=1.2, **look(found, arm),
        )  # fmt: skip
        for place, (cell, _) in zip(x, cells, strict=True):
            axes.plot(
                [place] * len(cell.by_seed), list(cell.by_seed.values()), ".", color=look(found, arm)["color"], ms=3
            )
    bigram = [cell.bigram for cell in found.cells if cell.bigram is not None and cell.column == column]
    if bigram and drawn:
        axes.axhline(min(bigram), color="grey", linewidth=0.8)
        axes.annotate("bigram model", (1, min(bigram)), (-4, 2), ("axes fraction", "data"), "offset points", ha="right")
    if not drawn:
        return None
    _depth_axis(axes, found)
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def loss_by_rate(found: Findings, column: str) -> Figure | None:
    """A panel a depth: tuned losses with the parabola near the best rate; a cross at the top for a diverged rate."""
    depths = [d for d in found.depths if any(cell.by_rate for arm in found.arms if (cell := found.at(arm, d, column)))]
    if not depths:
        return None
    across = min(3, len(depths))
    down = math.ceil(len(depths) / across)
    figure, grid = _canvas(3.2 * across, 2.9 * down + 0.6, down, across, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(depths):
            axes.set_visible(False)
            continue
        for arm in found.arms:
            if cell := found.at(arm, depths[place], column):
                _draw_rates(axes, found, cell)
        axes.set_title(f"{depths[place]} layers")
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        axes.set_xlabel("learning rate")
    for row in grid:
        row[0].set_ylabel("validation loss (nats per token)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def _draw_rates(axes: Any, found: Findings, cell: CellFinding) -> None:
    style = look(found, cell.arm)
    finite = {rate: loss for rate, loss in cell.by_rate.items() if math.isfinite(loss)}
    axes.plot(list(finite), list(finite.values()), label=cell.arm, markersize=4, linewidth=0.8, **style)
    for rate in cell.by_rate.keys() - finite.keys():
        axes.plot([rate], [0.98], "x", color=style["color"], transform=axes.get_xaxis_transform(), clip_on=False)
    points = around(cell.by_rate)
    if cell.vertex is not None:
        x, y = np.array(points).T
        fit = np.polyfit(x, y, 2)
        dense = np.linspace(x.min(), x.max(), 50)
        axes.plot(np.exp(dense), np.polyval(fit, dense), color=style["color"], linewidth=0.6, alpha=0.6)


def outcome_map(found: Findings, column: str) -> Figure | None:
    """A row an arm and depth, a column a rate: what became of the run, as a mark and a shade."""
    rows = [cell for arm in found.arms for cell in _cells(found, arm, column) if cell.by_rate]
    rates = sorted({rate for cell in rows for rate in cell.by_rate})
    if not rows:
        return None
    figure, ((axes,),) = _canvas(2.6 + 0.5 * len(rates), 1.0 + 0.24 * len(rows))
    shades = np.full((len(rows), len(rates)), np.nan)
    for y, cell in enumerate(rows):
        for rate, outcome in outcomes(cell).items():
            x = rates.index(rate)
            shades[y, x] = OUTCOME_SHADES[outcome]
            axes.text(x, y, OUTCOME_MARKS[outcome], ha="center", va="center", fontfamily="DejaVu Sans", fontsize=8)
    axes.imshow(shades, cmap="Oranges", vmin=0, vmax=5, aspect="auto")
    axes.set_xticks(range(len(rates)), [f"{rate:.2g}" for rate in rates], rotation=60)
    axes.set_yticks(range(len(rows)), [f"{cell.arm}, {cell.depth}" for cell in rows])
    axes.set_xlabel("learning rate")
    axes.grid(visible=False)
    axes.set_title(
        "  ".join(f"{mark} {words}" for words, mark in OUTCOME_MARKS.items()), fontsize=8, family="DejaVu Sans"
    )
    return figure


def rate_by_depth(found: Findings, column: str) -> Figure | None:
    """Best rates with the interval of the parabola's lowest point, and the power of the depth that fits them."""
    figure, ((axes,),) = _canvas()
    drawn = False
    for arm in found.arms:
        cells = [cell for cell in _cells(found, arm, column) if cell.best_rate is not None]
        if not cells:
            continue
        drawn, fit = True, transfer(found, arm, column)
        label = arm if fit is None else f"{arm}: depth^{fit.slope:.2f}" + (f" ± {fit.half:.2f}" if fit.half else "")
        style = look(found, arm)
        axes.plot([c.depth for c in cells], [c.best_rate for c in cells], label=label, markersize=5, **style)
        for cell in cells:
            if cell.vertex is not None and cell.vertex.high > cell.vertex.low:
                axes.vlines(cell.depth, cell.vertex.low, cell.vertex.high, color=style["color"], alpha=0.4, linewidth=3)
    if not drawn:
        return None
    _depth_axis(axes, found)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    _plain_ticks(axes.yaxis)
    axes.set_ylabel("best learning rate")
    axes.legend(fontsize=8)
    return figure


def use_of_layers(found: Findings, column: str) -> Figure | None:
    """Of the deepest models: the rise of the loss when a layer writes nothing, over relative depth."""
    measured = [
        (cell, run) for cell in found.cells if cell.column == column for run in cell.confirming if run.get("layers")
    ]
    if not measured:
        return None
    depth = max(cell.depth for cell, _ in measured)
    figure, ((axes, turns),) = _canvas(8.0, 3.4, 1, 2)
    for arm in found.arms:
        runs = [used for cell, run in measured if (cell.arm, cell.depth) == (arm, depth) and (used := run["layers"])]
        if not runs:
            continue
        style = look(found, arm) | {"markersize": 3, "linewidth": 0.9}
        layers = [int(layer) + 1 for layer in runs[0]["layer_rises"]]
        rises = np.mean([list(run["layer_rises"].values()) for run in runs], axis=0)
        axes.plot(layers, np.maximum(rises, 1e-5), label=arm, **style)
        if runs[0]["angles"]:
            angles = np.mean([run["angles"] for run in runs], axis=0)
            turns.plot(range(1, len(angles) + 1), angles, label=arm, **style)
    axes.set_yscale("log")
    axes.set_ylabel("rise of the loss without the layer (nats)")
    turns.set_ylabel("turn of the stream by the layer (half turns)")
    for each in (axes, turns):
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.set_xlabel(f"layer of {depth}")
    axes.legend(fontsize=8)
    return figure


def signal(found: Findings, column: str) -> Figure | None:
    """Size of the stream and of its gradient at each layer of the deepest models, before training, as the theory has
    it, and at the end."""
    own = [(cell, run) for cell in found.cells if cell.column == column for run in cell.confirming[:1]]
    measured = [(cell, run, start) for cell, run in own if (start := (run.get("layers") or {}).get("start"))]
    if not measured:
        return None
    depth = max(cell.depth for cell, *_ in measured)
    figure, grid = _canvas(8.0, 3.6, 1, 2)
    for cell, run, before in (each for each in measured if each[0].depth == depth):
        for axes, (name, start, power) in zip(grid[0], SIGNALS, strict=True):
            ends = run["signal"].get("end", {})
            values = {int(key.split("/")[1]): v for key, v in ends.items() if key.endswith("/" + name)}
            style = look(found, cell.arm) | {"marker": ""}
            axes.plot(list(values), list(values.values()), label=cell.arm, **(style | {"linestyle": "-"}))
            for key, dash, width in ((start, ":", 1.5), (f"predicted_{start}", "--", 0.9)):
                line = [math.nan if value is None else value**power for value in before[key]]
                axes.plot(range(len(line)), line, **(style | {"linestyle": dash, "linewidth": width}))
    for axes, (name, *_) in zip(grid[0], SIGNALS, strict=True):
        axes.set_yscale("log")
        axes.set_xlabel(f"layer of {depth} (dotted: start, dashed: its theory, line: end)")
        axes.set_ylabel({"stream_rms": "root mean square of the stream", "grad_norm": "norm of its gradient"}[name])
    grid[0][0].legend(fontsize=8)
    return figure


def cost(found: Findings, column: str) -> Figure | None:
    """Confirmed losses against FLOPs and seconds; the points that nothing beats in both are joined."""
    cells = [(cell, mean) for cell in found.cells if cell.column == column and (mean := found.mean(cell)) is not None]
    if len(cells) < 2:
        return None
    figure, grid = _canvas(8.0, 3.4, 1, 2, sharey=True)
    seconds = [float(np.median([run["seconds"] for run in cell.confirming])) for cell, _ in cells]
    for axes, costs, name in (
        (grid[0][0], [c.cell.flops for c, _ in cells], "FLOPs"),
        (grid[0][1], seconds, "seconds of steps"),
    ):
        for (cell, mean), x in zip(cells, costs, strict=True):
            axes.plot([x], [mean.mean], markersize=6, **look(found, cell.arm))
            axes.annotate(str(cell.depth), (x, mean.mean), (4, 3), textcoords="offset points", fontsize=7)
        front = pareto([(x, mean.mean) for (_, mean), x in zip(cells, costs, strict=True)])
        axes.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8)
        axes.set_xlabel(f"{name} a run (beside a mark: layers)")
    grid[0][0].set_ylabel("validation loss (nats per token)")
    for arm in found.arms:
        grid[0][0].plot([], [], label=arm, **(look(found, arm) | {"linestyle": ""}))
    grid[0][0].legend(fontsize=8)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those for which no other is as cheap and better, or cheaper and as good; by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def curves(found: Findings, column: str) -> Figure | None:
    """Training losses of the confirming runs of the deepest models."""
    own = [cell for cell in found.cells if cell.column == column and cell.confirming]
    if not own:
        return None
    depth = max(cell.depth for cell in own)
    figure, ((axes,),) = _canvas()
    for cell in (cell for cell in own if cell.depth == depth):
        for place, run in enumerate(cell.confirming):
            x, y = zip(*run["curve"], strict=True)
            style = look(found, cell.arm) | {"marker": "", "linewidth": 0.8}
            axes.plot(
                x, [math.nan if value is None else value for value in y], label=None if place else cell.arm, **style
            )
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss (nats per token), {depth} layers")
    axes.legend()
    return figure
