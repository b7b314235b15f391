"""What a study still has to run, stage by stage, and where each cell's search stands: a function of its results."""

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stablelm.study.cells import Cell, Run
from stablelm.study.search import Best, Edge, Next, replay
from stablelm.study.study_file import Study


@dataclass(frozen=True)
class CellState:
    """A cell, its search so far, and its runs that have no result yet."""

    cell: Cell
    found: Next | Best | Edge
    open: tuple[Run, ...]
    stage: str
    """tune or confirm; done where nothing is open."""


def agenda(study: Study, cells: Collection[Cell], losses: Mapping[str, float]) -> list[CellState]:
    """The state of every cell, from the losses of finished runs by their id, infinite where a run diverged.

    All runs that are open may run at once: what follows them depends on all of them.
    """
    return [_state(study, cell, losses) for cell in cells]


def _state(study: Study, cell: Cell, losses: Mapping[str, float]) -> CellState:
    _, found = _searched(study, cell, losses)
    if isinstance(found, Next):
        runs = [Run(cell, rate, seed) for rate in found.rates for seed in study.seeds.tune]
        return CellState(cell, found, tuple(run for run in runs if run.id not in losses), "tune")
    if isinstance(found, Best) and "confirm" in study.stages:
        runs = [Run(cell, found.rate, seed) for seed in study.seeds.confirm]
        if left := tuple(run for run in runs if run.id not in losses):
            return CellState(cell, found, left, "confirm")
    return CellState(cell, found, (), "done")


def _searched(study: Study, cell: Cell, losses: Mapping[str, float]) -> tuple[dict[float, float], Next | Best | Edge]:
    """Mean losses over the tuning seeds on the search's path: rates of another grid are not looked at."""

    def loss(rate: float) -> float | None:
        made = [losses.get(Run(cell, rate, seed).id) for seed in study.seeds.tune]
        known = [each for each in made if each is not None]
        return mean(known) if len(known) == len(made) else None

    return replay(study.lr, loss)


def mean(losses: Collection[float]) -> float:
    """Infinite if one of them is."""
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def tuning_runs(study: Study, cell: Cell, losses: Mapping[str, float]) -> list[Run]:
    """The runs of a cell's search that have finished, by rate."""
    known, _ = _searched(study, cell, losses)
    return [Run(cell, rate, seed) for rate in sorted(known) for seed in study.seeds.tune]


def most_runs(study: Study) -> int:
    """Runs of a cell at the most."""
    rates = len(study.lr.fixed) if study.lr.fixed else study.lr.max_runs
    return rates * len(study.seeds.tune) + len(study.seeds.confirm) * ("confirm" in study.stages)
