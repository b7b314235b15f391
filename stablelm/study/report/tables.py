"""The tables of a report: each a title, a heading and rows of text, for the page, Markdown and CSV alike."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stablelm.study.report.findings import CellFinding, Findings, outcomes, overhead, regret, transfer, words_of
from stablelm.study.report.ranking import ranking


class Table(NamedTuple):
    """`name`: of the CSV file."""

    name: str
    title: str
    heading: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def tables(found: Findings) -> Iterator[Table]:
    yield _ranking(found)
    yield _cells(found)
    yield _rates(found)
    if found.study.shapes.rule == "fixed_width":
        yield _transfer(found)
    yield _shapes(found)
    if any(run.get("layers") for run in found.runs):
        yield _layers(found)
    yield _runs(found)


def number(value: float | None, digits: int = 4) -> str:
    """A dash for what is not known, a word for what is not finite."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _ranking(found: Findings) -> Table:
    rows = []
    for column in found.columns:
        for depth in found.depths:
            for place in ranking(found, depth, column):
                mean, behind = place.mean, place.behind
                rows.append((
                    str(depth), column or "-", place.finding.arm, number(mean.mean), number(mean.half),
                    number(behind.mean if behind else 0.0), number(behind.half if behind else None),
                    number(place.p, 3), f"{place.share_best:.2f}",
                    "best" if behind is None else "tie" if place.ties else "behind",
                ))  # fmt: skip
    heading = ("layers", "budget", "arm", "loss", "±", "behind the best", "±", "p (Holm)", "P(best)", "verdict")
    note = (
        "Confirming seeds alone, paired by seed; intervals of 95 %, with the deviation pooled over cells for a loss; "
        "P(best) draws seeds and validation windows again. A difference inside its interval is a tie."
    )
    return Table("ranking", "Ranking at each depth", heading, rows, note)


def _cells(found: Findings) -> Table:
    rows = []
    for cell in found.cells:
        mean = found.mean(cell)
        rows.append((
            cell.arm, str(cell.depth), cell.column or "-", number(mean.mean if mean else None),
            number(mean.half if mean else None), ", ".join(number(loss) for loss in cell.by_seed.values()) or "-",
            number(_only(cell, "unigram_loss")), number(cell.bigram), _state(cell),
        ))  # fmt: skip
    heading = ("arm", "layers", "budget", "loss", "±", "by seed", "unigram", "bigram", "state")
    return Table("cells", "Confirmed losses", heading, rows, "Nats per token, on the whole validation set.")


def _only(cell: CellFinding, name: str) -> float | None:
    return next((run[name] for run in (*cell.confirming, *cell.tuning) if run.get(name) is not None), None)


def _state(cell: CellFinding) -> str:
    if cell.edge:
        return f"edge: {cell.edge}"
    open_ = len(cell.state.open)
    return f"{cell.state.stage}, {open_} runs missing" if open_ else "done"


def _rates(found: Findings) -> Table:
    rows, start = [], found.study.lr.fixed or found.study.lr.start
    for cell in found.cells:
        peak = cell.vertex
        tried = "; ".join(
            f"{rate:.2g}: {number(cell.by_rate[rate], 3)}{'' if outcome == 'trained' else f' ({outcome})'}"
            for rate, outcome in outcomes(cell).items()
        )
        rows.append((
            cell.arm, str(cell.depth), cell.column or "-", f"{cell.best_rate:.4g}" if cell.best_rate else "-",
            f"{peak.rate:.3g} ({peak.low:.3g} to {peak.high:.3g})" if peak else "-",
            number(cell.sensitivity(start)), number(cell.excess), tried or "-",
        ))  # fmt: skip
    heading = ("arm", "layers", "budget", "best rate", "lowest point", "sensitivity", "excess near", "tuning losses")
    note = (
        "Lowest point: of a parabola in the logarithm of the rate through the three to five points around the best, if "
        "it is convex and the point lies inside; its interval redraws the noise. Sensitivity: Wortsman et al. 2023, "
        "section 2.2, over the first rates of the study. Excess: mean loss above the best from a fourth to four times "
        "its rate."
    )
    return Table("rates", "Learning rates", heading, rows, note)


def _transfer(found: Findings) -> Table:
    rows = []
    for column in found.columns:
        for arm in found.arms:
            fit = transfer(found, arm, column)
            slope = "-" if fit is None else f"{fit.slope:.2f}" + (f" ± {fit.half:.2f}" if fit.half else "")
            lost = [f"{depth}: {number(regret(found, arm, depth, column))}" for depth in found.depths[1:]]
            rows.append((arm, column or "-", slope, "; ".join(lost)))
    heading = ("arm", "budget", "power of the depth", "loss lost with the shallowest depth's rate")
    return Table("transfer", "Transfer of the rate over depth", heading, rows)


def _shapes(found: Findings) -> Table:
    rows = []
    for each in found.cells:
        cell, cost = each.cell, overhead(found, each.arm, each.depth, each.column)
        seconds = [run["seconds"] / run["tokens"] for run in (*each.tuning, *each.confirming)]
        rows.append((
            each.arm, str(cell.shape), str(cell.shape.n_heads), str(cell.shape.d_ff), f"{cell.counts['layers']:,}",
            f"{cell.counts['total']:,}", f"{cell.tokens:,}", f"{cell.flops:.3g}",
            f"{1e6 * sorted(seconds)[len(seconds) // 2]:.1f}" if seconds else "-", number(cost, 2),
        ))  # fmt: skip
    heading = ("arm", "shape", "heads", "d_ff", "layers", "in all", "tokens", "FLOPs", "µs a token", "of the first arm")
    return Table(
        "shapes", "Shapes and cost", heading, rows, "Seconds of one thread; parameters of the layers and in all."
    )


def _layers(found: Findings) -> Table:
    rows = []
    for cell in found.cells:
        for run in cell.confirming:
            if used := run.get("layers"):
                rises = list(used["block_rises"].items())
                most = max(rises, key=lambda item: item[1])
                least = min(rises, key=lambda item: item[1])
                rows.append((
                    cell.arm, str(cell.depth), str(run["seed"]), f"{used['share_of_layers']:.2f}",
                    f"{most[0]}: {most[1]:+.3f}", f"{least[0]}: {least[1]:+.3f}",
                ))  # fmt: skip
    heading = ("arm", "layers", "seed", "share of layers in use", "dearest block", "cheapest block")
    note = (
        "Share: participation ratio of the rises of the loss when one layer writes nothing, of the number of layers "
        "tried. Blocks: a tenth of the layers, counted from 0, with the rise of the loss without them."
    )
    return Table("layers", "Use of layers", heading, rows, note)


def _runs(found: Findings) -> Table:
    rows = []
    for run in found.runs:
        own = run["provenance"]
        rows.append((
            words_of(run), run["outcome"], number(run["val_loss"]), number(run["train_loss"]), f"{run['seconds']:.0f}",
            run["id"], str(own.get("commit") or "-")[:10] + ("+" if own.get("changed") else ""),
            str(own.get("config")), str(own.get("tokenizer"))[:10], str(own.get("processor")),
        ))  # fmt: skip
    heading = (
        "run", "outcome", "validation", "training", "seconds", "id", "commit", "config", "tokenizer", "processor",
    )  # fmt: skip
    return Table("runs", "Runs", heading, rows, "Every run, diverged ones too. +: the program had uncommitted changes.")


def as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.heading)
    writer.writerows(table.rows)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.heading), "|" + "---|" * len(table.heading), *map(line, table.rows)])
