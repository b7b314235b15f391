"""What the results of a study say: of each cell, of arms against each other at each depth, and with what reservations.

An arm is a combination of the grid's values without the depth and the budget's column, a method for example; a column
is one budget. Arms are compared at equal depth and column.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stablelm.study import results
from stablelm.study.agenda import CellState, agenda, tuning_runs
from stablelm.study.cells import Cell, Run
from stablelm.study.results import NOT_FINITE, Result
from stablelm.study.search import Best, Edge
from stablelm.study.sensitivity import lr_sensitivity
from stablelm.study.statistics import Fit, MeanInterval, Vertex, interval, line, pooled, vertex
from stablelm.study.study_file import DEPTH, Study

COLUMNS = ("tokens_per_parameter", "flops")
NEIGHBOURHOOD = 4.0
"""Rates from a fourth to four times the best one count as its neighbourhood."""


def arm_of(point: Iterable[tuple[str, Any]]) -> str:
    """An arm's name, from the point of one of its cells."""
    own = [(key, value) for key, value in point if key not in (DEPTH, *COLUMNS)]
    words = [str(value) if key == "model.method" else f"{key.rpartition('.')[2]} {value}" for key, value in own]
    return ", ".join(words) or "all"


@dataclass(frozen=True)
class CellFinding:
    """One cell: how its search ended and what its runs reached."""

    state: CellState
    tuning: list[Result]
    confirming: list[Result]
    bigram: float | None
    sd: float | None
    """Of a run's loss, pooled over the study's cells."""

    @property
    def cell(self) -> Cell:
        return self.state.cell

    @property
    def depth(self) -> int:
        return self.cell.shape.n_layers

    @cached_property
    def arm(self) -> str:
        return arm_of(self.cell.point)

    @cached_property
    def column(self) -> str:
        return ", ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in self.cell.point if key in COLUMNS)

    @cached_property
    def by_rate(self) -> dict[float, float]:
        """Mean tuning loss of each rate that was tried, infinite where a seed diverged."""
        found: dict[float, list[float]] = {}
        for each in self.tuning:
            found.setdefault(each["lr"], []).append(results.loss_of(each))
        return {
            rate: statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf
            for rate, losses in sorted(found.items())
        }

    @property
    def best_rate(self) -> float | None:
        """None while the search goes on or where it ended at an edge."""
        return self.state.found.rate if isinstance(self.state.found, Best) else None

    @property
    def edge(self) -> str:
        return self.state.found.why if isinstance(self.state.found, Edge) else ""

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """Confirmed losses, infinite where a run diverged."""
        return {each["seed"]: results.loss_of(each) for each in self.confirming}

    @cached_property
    def vertex(self) -> Vertex | None:
        return vertex(self.by_rate, self.sd)

    def sensitivity(self, rates: Sequence[float]) -> float | None:
        """Wortsman et al. 2023, over the study's first rates; None until all of them have run."""
        if any(rate not in self.by_rate for rate in rates):
            return None
        first = [each["first_loss"] for each in self.tuning if each["first_loss"] is not None]
        own = {rate: self.by_rate[rate] for rate in rates}
        if not first or not any(map(math.isfinite, own.values())):
            return None
        return lr_sensitivity(own, statistics.fmean(first))

    @cached_property
    def excess(self) -> float | None:
        """Mean loss above the best one over the rates from lr*/4 to 4 lr*, a diverged one as the first loss."""
        if self.best_rate is None:
            return None
        first = [each["first_loss"] for each in self.tuning if each["first_loss"] is not None]
        low, high = self.best_rate / NEIGHBOURHOOD * 0.999, self.best_rate * NEIGHBOURHOOD * 1.001
        near = [loss for rate, loss in self.by_rate.items() if low <= rate <= high]
        best = self.by_rate[self.best_rate]
        return statistics.fmean(min(loss, first[0] if first else math.inf) - best for loss in near)


@dataclass(frozen=True)
class Findings:
    """All cells of a study; `foreign`: results in its folder that belong to none of its cells."""

    study: Study
    cells: list[CellFinding]
    foreign: list[Result] = field(default_factory=list)

    @cached_property
    def spread(self) -> tuple[float, int] | None:
        return spread_of(self.cells)

    @cached_property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(each.arm for each in self.cells))

    @cached_property
    def depths(self) -> list[int]:
        return sorted({each.depth for each in self.cells})

    @cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(each.column for each in self.cells))

    @cached_property
    def runs(self) -> list[Result]:
        """Every result that belongs to a cell, each once."""
        every = [result for each in self.cells for result in (*each.tuning, *each.confirming)]
        return list({result["id"]: result for result in every}.values())

    def at(self, arm: str, depth: int, column: str) -> CellFinding | None:
        return next((e for e in self.cells if (e.arm, e.depth, e.column) == (arm, depth, column)), None)

    def mean(self, finding: CellFinding) -> MeanInterval | None:
        """Of the confirmed losses; None where there are none or one diverged."""
        losses = list(finding.by_seed.values())
        return interval(losses, self.spread) if losses and all(map(math.isfinite, losses)) else None


def findings(
    study: Study, cells: Sequence[Cell], found: Mapping[str, Result], bigrams: Mapping[str, float | None]
) -> Findings:
    """`bigrams`: the loss of the bigram model by a cell's name."""
    made = [
        _finding(study, state, found, bigrams, None) for state in agenda(study, cells, results.losses(found.values()))
    ]
    spread = spread_of(made)
    sd = spread[0] if spread else None
    made = [_finding(study, each.state, found, bigrams, sd) for each in made]
    own = {result["id"] for each in made for result in (*each.tuning, *each.confirming)}
    return Findings(study, made, [result for name, result in found.items() if name not in own])


def _finding(
    study: Study, state: CellState, found: Mapping[str, Result], bigrams: Mapping[str, float | None], sd: float | None
) -> CellFinding:
    runs = tuning_runs(study, state.cell, results.losses(found.values()))
    tuning, confirming = [found[run.id] for run in runs], []
    if isinstance(state.found, Best):
        ids = [Run(state.cell, state.found.rate, seed).id for seed in study.seeds.confirm]
        confirming = [found[name] for name in ids if name in found]
    return CellFinding(state, tuning, confirming, bigrams.get(state.cell.name), sd)


def spread_of(cells: Sequence[CellFinding]) -> tuple[float, int] | None:
    """Pooled over cells none of whose confirming runs diverged."""
    losses = [list(each.by_seed.values()) for each in cells]
    return pooled([each for each in losses if each and all(map(math.isfinite, each))])


def transfer(found: Findings, arm: str, column: str) -> Fit | None:
    """ln best rate against ln depth."""
    cells = [each for depth in found.depths if (each := found.at(arm, depth, column))]
    points = [(math.log(each.depth), math.log(each.best_rate)) for each in cells if each.best_rate is not None]
    return line(points)


def regret(found: Findings, arm: str, depth: int, column: str) -> float | None:
    """Tuning loss at the shallowest depth's best rate less the best at this depth; None where it was not tried."""
    first, own = found.at(arm, found.depths[0], column), found.at(arm, depth, column)
    if first is None or own is None or first.best_rate is None or own.best_rate is None:
        return None
    loss = own.by_rate.get(first.best_rate)
    return None if loss is None else loss - own.by_rate[own.best_rate]


def overhead(found: Findings, arm: str, depth: int, column: str) -> float | None:
    """Seconds a token of an arm, of those of the first arm with the same shape."""
    base, own = found.at(found.arms[0], depth, column), found.at(arm, depth, column)
    if base is None or own is None or base.cell.shape != own.cell.shape:
        return None
    rates = [
        statistics.median(each["seconds"] / each["tokens"] for each in (*cell.tuning, *cell.confirming))
        for cell in (own, base)
        if cell.tuning
    ]
    return rates[0] / rates[1] if len(rates) == 2 and rates[1] else None


def outcomes(finding: CellFinding) -> dict[float, str]:
    """The outcome of each rate: the worst of its seeds."""
    order = results.OUTCOMES
    found: dict[float, str] = {}
    for each in finding.tuning:
        known = found.get(each["lr"], each["outcome"])
        found[each["lr"]] = min(known, each["outcome"], key=order.index)
    return dict(sorted(found.items()))


def diverged(found: Findings) -> list[Result]:
    return [each for each in found.runs if each["outcome"] == NOT_FINITE]


def words_of(result: Mapping[str, Any]) -> str:
    """A run in words."""
    point = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in result["point"].items())
    return f"{point} lr={result['lr']:g} seed={result['seed']}"
