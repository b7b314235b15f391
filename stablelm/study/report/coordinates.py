"""The report of a study of kind coordinates: sizes step by step, and how they grow with depth and width."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from stablelm.probe.coordinate_check import TITLES
from stablelm.probe.coordinates import FIGURES, LIMIT, STEPS, SizeSeries
from stablelm.probe.probe_report import tick
from stablelm.study.cells import Cell
from stablelm.study.coordinates import Sizes, read_sizes, runs_of
from stablelm.study.report.conclusions import of_programs
from stablelm.study.report.figures import DASHES, MARKS, STYLE
from stablelm.study.report.findings import arm_of
from stablelm.study.report.tables import Table, number
from stablelm.study.report.writer import ReportContents
from stablelm.study.study_file import Study

SHADED = 1.0
"""The slope of the darkest cells of the map."""


@dataclass(frozen=True)
class CheckedArm:
    """The measured models of an arm, by (depth, width): figures (STEPS + 1, len(FIGURES)), nan where not finite."""

    arm: str
    models: dict[tuple[int, int], np.ndarray]

    @cached_property
    def depths(self) -> list[int]:
        return sorted({depth for depth, _ in self.models})

    @cached_property
    def widths(self) -> list[int]:
        return sorted({width for _, width in self.models})

    @cached_property
    def lines(self) -> list[SizeSeries]:
        """Models that differ in depth alone, for each width, then in width alone, for each depth; two or more each."""
        found = [self._line("depth", self.depths, width) for width in self.widths]
        found += [self._line("width", self.widths, depth) for depth in self.depths]
        return [line for line in found if len(line.sizes) > 1]

    def _line(self, axis: str, sizes: Sequence[int], fixed: int) -> SizeSeries:
        places = [(size, fixed) if axis == "depth" else (fixed, size) for size in sizes]
        there = [place for place in places if place in self.models]
        own = tuple(place[axis == "width"] for place in there)
        return SizeSeries(axis, own, fixed, np.array([self.models[place] for place in there]))


def contents(study: Study, cells: Sequence[Cell]) -> ReportContents:
    """Of the models that are measured. Raises ConfigError."""
    known = read_sizes(study.results_folder)
    assert study.lr.fixed is not None
    runs = runs_of(study, cells)
    made = [(run.cell, known[run.id]) for run in runs if run.id in known]
    arms = _arms(made)
    foreign = [f"{each['point']} ({each['id']})" for each in known.values() if each["id"] not in {r.id for r in runs}]
    return ReportContents(
        study,
        f"{len(made)} of {len(runs)} models, {STEPS} steps at learning rate {study.lr.fixed[0]:g}",
        _banners(made, len(runs)),
        [sentence for arm in arms for sentence in _verdicts(arm)],
        [
            (f"seed {study.seeds.tune[0]} alone", False),
            (f"{STEPS} steps on one batch at a constant rate", False),
            ("the same rate at every size, which is what a transfer of the rate needs and no proof of one", False),
        ],
        _figures(arms),
        [_slopes(arms), _models(made)],
        [("Results of no model of this study", "Left from another grid; they are in no table.", foreign)],
    )


def _arms(made: Sequence[tuple[Cell, Sizes]]) -> list[CheckedArm]:
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for cell, sizes in made:
        rows = [[math.nan if value is None else float(value) for value in row] for row in sizes["figures"]]
        found.setdefault(arm_of(cell.point), {})[cell.shape.n_layers, cell.shape.d_model] = np.array(rows)
    return [CheckedArm(arm, models) for arm, models in found.items()]


def _banners(made: Sequence[tuple[Cell, Sizes]], wanted: int) -> list[str]:
    lines = [f"{wanted - len(made)} of {wanted} models are not measured yet."] if len(made) < wanted else []
    return lines + of_programs(sizes["provenance"] for _, sizes in made)


def _verdicts(arm: CheckedArm) -> Iterator[str]:
    """For each axis: which figures grow, where most."""
    for axis, other in (("depth", "width"), ("width", "depth")):
        lines = [line for line in arm.lines if line.axis == axis]
        if not lines:
            continue
        grown = [(name, line) for line in lines for name in line.growing()]
        if not grown:
            most = max(slope for line in lines for slope in line.slopes().values())
            yield f"{arm.arm} passes in {axis}: no size grows with a slope above {LIMIT} (the largest is {most:+.2f})."
            continue
        words = []
        for name in dict.fromkeys(name for name, _ in grown):
            own = [(line.slopes()[name], line.fixed) for each, line in grown if each == name]
            steepest, fixed = max(own, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
            size = "is not finite" if math.isnan(steepest) else f"{steepest:+.2f}"
            words.append(f"{TITLES[name]} ({size} at {other} {fixed})")
        yield f"{arm.arm} fails in {axis}: {', '.join(words)}."


def _figures(arms: Sequence[CheckedArm]) -> Iterator[tuple[str, str, Figure]]:
    if any(arm.lines for arm in arms):
        with rc_context(STYLE):
            yield "slopes", "Slopes against depth and width", _map([arm for arm in arms if arm.lines])
    for arm in arms:
        with rc_context(STYLE):
            yield f"steps-{arms.index(arm) + 1}", f"{arm.arm}: sizes step by step", _by_step(arm)


def _map(arms: Sequence[CheckedArm]) -> Figure:
    """A block of cells for each arm: figures down, lines of models across; what fails is marked, not shaded alone."""
    columns = max(len(arm.lines) for arm in arms)
    figure = Figure(figsize=(1.9 + 0.62 * columns, 2.25 * len(arms) + 0.5), layout="constrained")
    panels = figure.subplots(len(arms), 1, squeeze=False)[:, 0]
    for panel, arm in zip(panels, arms, strict=True):
        values = np.array([[line.slopes()[name] for line in arm.lines] for name in FIGURES])
        panel.imshow(values, cmap="RdBu_r", vmin=-SHADED, vmax=SHADED, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            failed = not value <= LIMIT
            words = "✕" if math.isnan(value) else f"{value:+.2f}"
            colour = "white" if abs(value) > 0.6 * SHADED else "black"
            panel.text(
                column, row, words, ha="center", va="center", fontsize=8, color=colour,
                fontweight="bold" if failed else "normal",
                bbox={"boxstyle": "square,pad=0.25", "fill": False, "edgecolor": colour} if failed else None,
            )  # fmt: skip
        depth_lines = sum(line.axis == "depth" for line in arm.lines)
        panel.axvline(depth_lines - 0.5, color="black", linewidth=1)
        labels = [f"{'d' if line.axis == 'depth' else 'n'} {line.fixed}" for line in arm.lines]
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_yticks(range(len(FIGURES)), [TITLES[name] for name in FIGURES])
        panel.set_title(arm.arm, loc="left", fontsize=9)
        panel.grid(visible=False)
        panel.tick_params(length=0)
    figure.supxlabel(
        "d: in depth, at so many features\nn: in width, at so many layers\nboxed: above the limit", fontsize=8
    )
    return figure


def _by_step(arm: CheckedArm) -> Figure:
    """A panel for each figure: a curve for each model, darker when deeper; marks tell widths."""
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    *panels, last = figure.subplots(2, 3).ravel()
    for index, (panel, name) in enumerate(zip(panels, FIGURES, strict=True)):
        for (depth, width), values in sorted(arm.models.items()):
            place = arm.depths.index(depth) / max(1, len(arm.depths) - 1)
            look: dict[str, Any] = {"color": colormaps["viridis_r"](0.15 + 0.85 * place), "markersize": 3}
            kind = arm.widths.index(width)
            own = values[:, index]
            panel.plot(
                np.flatnonzero(own > 0), own[own > 0], linewidth=1.1, marker=MARKS[kind % len(MARKS)],
                linestyle=DASHES[kind % len(DASHES)], label=f"{depth}x{width}", **look,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        panel.yaxis.set_major_formatter(FuncFormatter(tick))
        panel.minorticks_off()
        panel.set_title(TITLES[name], loc="left", fontsize=9)
        panel.set_xlabel("step")
    last.axis("off")
    last.legend(*panels[0].get_legend_handles_labels(), loc="center", ncols=2, fontsize=8, title="layers x width")
    return figure


def _slopes(arms: Sequence[CheckedArm]) -> Table:
    rows = []
    for arm in arms:
        for line in arm.lines:
            slopes = line.slopes()
            sizes = ", ".join(map(str, line.sizes))
            rows.append((arm.arm, line.axis, sizes, str(line.fixed), *(number(slopes[name], 2) for name in FIGURES)))
    heading = ("arm", "in", "sizes", "the other", *(TITLES[name] for name in FIGURES))
    note = (
        f"Exponents of the root mean square after step {STEPS}, by least squares in the logarithms; above {LIMIT} a "
        "size fails (Yang et al. 2021, appendix D.1, for width; Dey et al. 2025 for depth)."
    )
    return Table("slopes", "Slopes", heading, [tuple(row) for row in rows], note)


def _models(made: Sequence[tuple[Cell, Sizes]]) -> Table:
    rows = []
    for cell, sizes in made:
        own = sizes["provenance"]
        last = [number(None if value is None else float(value), 3) for value in sizes["figures"][-1]]
        rows.append((
            arm_of(cell.point), str(cell.shape), f"{cell.counts['layers']:,}", *last, f"{sizes['seconds']:.0f}",
            sizes["id"], str(own.get("commit") or "-")[:10] + ("+" if own.get("changed") else ""),
            str(own.get("config")), str(own.get("tokenizer"))[:10], str(own.get("processor")),
        ))  # fmt: skip
    sized = tuple(TITLES[name] for name in FIGURES)
    end = ("seconds", "id", "commit", "config", "tokenizer", "processor")
    note = f"Root mean squares after step {STEPS}. +: the program had uncommitted changes."
    return Table("runs", "Models", ("arm", "shape", "layers", *sized, *end), rows, note)
