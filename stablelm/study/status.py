"""A study in words: what it would run and at what cost, and how far it is."""

import math
from collections.abc import Callable, Mapping, Sequence

from stablelm.study import results
from stablelm.study.agenda import CellState, agenda, most_runs
from stablelm.study.cells import Cell, Run
from stablelm.study.collect import is_finished, run_dir
from stablelm.study.cost import MFU, Cost, flops_of, here
from stablelm.study.results import Result
from stablelm.study.search import Best, Edge, Next
from stablelm.study.study_file import Study
from stablelm.supervise.attempts import read_summary

Row = tuple[str, ...]


def table(rows: Sequence[Row], *, left: int = 1) -> str:
    """Columns in line, the first `left` to the left; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            word.ljust(width) if place < left else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def expansion(study: Study, cells: Sequence[Cell], found: Mapping[str, Result], cost: Callable[[Cell], Cost]) -> str:
    """All cells with their sizes and the cost of one run and of all, and the sums."""
    rates = len(study.lr.fixed or study.lr.start)
    least = rates * len(study.seeds.tune) + len(study.seeds.confirm) * ("confirm" in study.stages)
    heading = ("cell", "shape", "d_ff", "layers", "in all", "tokens", "FLOPs/token", "FLOPs/run", "min/run")
    gpus = study.resources.gpu is not None
    rows: list[Row] = [heading + (("engine", "GPUs", "GPU-hours") if gpus else ())]
    seconds = gpu_hours = 0.0
    for cell in cells:
        one = cost(cell)
        seconds, gpu_hours = seconds + one.seconds, gpu_hours + (one.gpu_hours or 0.0)
        own = (
            cell.name, str(cell.shape), f"{cell.shape.d_ff}", f"{cell.counts['layers']:,}", f"{cell.counts['total']:,}",
            f"{cell.tokens:,}", f"{flops_of(cell):.3g}", f"{cell.flops:.3g}",
            _minutes(one),
        )  # fmt: skip
        rows.append(own + ((one.kind or "-", f"{one.gpus or '-'}", f"{one.gpu_hours:.1f}") if gpus else ()))
    most = most_runs(study)
    lines = [table(rows), "", f"{len(cells)} cells, {least * len(cells)} to {most * len(cells)} runs"]
    if gpus:
        low, high = least * gpu_hours, most * gpu_hours
        lines.append(f"{low:,.0f} to {high:,.0f} GPU-hours on {study.resources.gpu}, predicted")
        if all(row[-2] == "-" for row in rows[1:]):
            lines.append(f"from FLOPs at {MFU:.0%} of the peak; --fit plans each run and says on how many GPUs it fits")
    else:
        low, high = (count * seconds / study.limits.jobs / 3600 for count in (least, most))
        lines.append(
            f"{low:.1f} to {high:.1f} hours here with {study.limits.jobs} at once; of runs like these where there are "
            "some, else a guess (?)"
        )
    if found:
        lines.append(f"{sum(run.id in found for run in _possible(study, cells))} of the first runs are finished")
    return "\n".join(lines)


def _minutes(cost: Cost) -> str:
    """Of a run; ? for a guess, - where it is not known on how many GPUs."""
    if cost.gpu_hours is not None and not cost.gpus:
        return "-"
    return f"{cost.seconds / 60:.1f}{'' if cost.measured or cost.gpus else '?'}"


def _possible(study: Study, cells: Sequence[Cell]) -> list[Run]:
    rates = study.lr.fixed or study.lr.start
    return [Run(cell, rate, seed) for cell in cells for rate in rates for seed in study.seeds.tune]


def progress(study: Study, cells: Sequence[Cell], found: Mapping[str, Result]) -> str:
    """A line a cell: its stage, best rate so far, losses, runs that are open or going on; and the time that is left."""
    states = agenda(study, cells, results.losses(found.values()))
    rows: list[Row] = [("cell", "shape", "stage", "best rate", "loss", "runs", "open", "running")]
    for state in states:
        rows.append(_row(study, state, found))
    left = sum(here(state.cell, found.values()).seconds * len(state.open) for state in states)
    done = sum(state.stage == "done" for state in states)
    edges = [state for state in states if isinstance(state.found, Edge)]
    lines = [table(rows), "", f"{done} of {len(states)} cells are done; {len(found)} runs have results"]
    lines += [f"edge: {state.cell.name}: {state.found.why}" for state in edges if isinstance(state.found, Edge)]
    lines += [f"diverged: {_words(each)}" for each in found.values() if each["outcome"] == results.NOT_FINITE]
    missing = [run for state in states for run in state.open if is_finished(study, run)]
    lines += [f"finished, but not collected yet: {run}" for run in missing]
    lines += [f"two cells with one identity: {names}" for names in doubles(study, cells)]
    if left:
        lines.append(f"about {left / 60 / study.limits.jobs:.0f} min for the runs that are open now")
    return "\n".join(lines)


def doubles(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Cells whose runs are the same, because what they differ in is not part of a run's identity."""
    by_id: dict[str, list[str]] = {}
    for cell in cells:
        by_id.setdefault(Run(cell, (study.lr.fixed or study.lr.start)[0], 0).id, []).append(cell.name)
    return [" and ".join(names) for names in by_id.values() if len(names) > 1]


def _words(result: Result) -> str:
    point = " ".join(f"{key}={value}" for key, value in result["point"].items())
    return f"{point} lr={result['lr']:g} seed={result['seed']} ({result['id']})"


def _row(study: Study, state: CellState, found: Mapping[str, Result]) -> Row:
    cell, best = state.cell, state.found
    own = [each for each in found.values() if each["point"] == dict(cell.point)]
    rate = best.rate if isinstance(best, Best | Edge) else None
    if isinstance(best, Next):
        finite = [each for each in own if math.isfinite(results.loss_of(each))]
        rate = min(finite, key=results.loss_of)["lr"] if finite else None
    losses = [results.loss_of(each) for each in own if each["lr"] == rate]
    running = [
        run
        for run in state.open
        if run_dir(study, run).exists() and "exit_code" not in read_summary(run_dir(study, run))
    ]
    return (
        cell.name, str(cell.shape), "edge" if isinstance(best, Edge) else state.stage,
        f"{rate:.4g}{'' if isinstance(best, Best) else '?'}" if rate else "-",
        f"{sum(losses) / len(losses):.4f}" if losses else "-", f"{len(own)}", f"{len(state.open)}", f"{len(running)}",
    )  # fmt: skip
