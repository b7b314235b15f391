"""Sentences of a report, made from its tables: what can be said, and what stands against it."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from stablelm.study import results
from stablelm.study.report.findings import CellFinding, Findings, diverged, transfer
from stablelm.study.report.ranking import Place, ranking
from stablelm.study.statistics import PairedDifference, paired, smallest_difference

FEWEST_SEEDS = 3
FEW_TOKENS = 5.0
"""Tokens a parameter below which a limit is printed in bold."""
FEWEST_DEPTHS = 4
LOADED = 0.5
"""Load of the machine above the study's own jobs from which its seconds are not trusted."""


def banners(found: Findings) -> list[str]:
    """What withholds a verdict."""
    lines = []
    if edges := [each for each in found.cells if each.edge]:
        lines += [f"The best rate of {each.arm} at depth {each.depth} is not known: {each.edge}." for each in edges]
    weak = [each for each in found.cells if not beats_bigram(found, each)]
    for each in weak:
        lines.append(
            f"{each.arm} at depth {each.depth} stays above the bigram model ({each.bigram:.4f} nats): its loss says "
            "nothing of depth."
        )
    few = [each for each in found.cells if each.best_rate is not None and len(each.by_seed) < FEWEST_SEEDS]
    if few:
        names = ", ".join(f"{each.arm} at depth {each.depth} ({len(each.by_seed)})" for each in few)
        lines.append(f"Fewer than {FEWEST_SEEDS} confirming seeds: {names}.")
    lines += of_programs([each["provenance"] for each in found.runs])
    if loaded := [each for each in found.runs if _under_load(found, each["provenance"])]:
        lines.append(f"{len(loaded)} of {len(found.runs)} runs were timed while other work ran: seconds say little.")
    return lines


def of_programs(provenances: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the programs that made the results."""
    known = list(provenances)
    commits, lines = {str(each.get("commit")) for each in known}, []
    if len(commits) > 1:
        lines.append(f"The runs are of {len(commits)} commits: {', '.join(sorted(c[:8] for c in commits))}.")
    if any(each.get("changed") for each in known):
        lines.append("Some runs were made by a program with uncommitted changes.")
    return lines


def _under_load(found: Findings, provenance: dict) -> bool:
    load = provenance.get("load")
    return isinstance(load, int | float) and load > found.study.limits.jobs + LOADED


def beats_bigram(found: Findings, finding: CellFinding) -> bool:
    """Whether its confirmed loss is below the bigram model's; true where one of them is not known."""
    mean = found.mean(finding)
    return mean is None or finding.bigram is None or mean.mean < finding.bigram


def limits(found: Findings) -> list[tuple[str, bool]]:
    """What the verdicts rest on, each with whether it is to be stressed."""
    ratios = [each["tokens"] / each["parameters"]["layers"] for each in found.runs]
    lines: list[tuple[str, bool]] = []
    if ratios:
        low, high = min(ratios), max(ratios)
        words = f"{low:.2g}" if math.isclose(low, high, rel_tol=0.05) else f"{low:.2g} to {high:.2g}"
        lines.append((f"{words} tokens a parameter of the layers", low < FEW_TOKENS))
    widths = sorted({each.cell.shape.d_model for each in found.cells})
    lines.append((f"widths {', '.join(map(str, widths))}", False))
    epochs = found.study.budget.max_epochs
    lines.append((f"at most {epochs:g} epoch{'s' * (epochs != 1)} of the text", False))
    if found.spread is not None:
        seeds = min((len(each.by_seed) for each in found.cells if each.by_seed), default=0)
        if seeds:
            least = smallest_difference(found.spread[0], seeds)
            lines.append((f"differences below {least:.4f} nats cannot be seen with {seeds} seeds (power 80 %)", False))
    return lines


def verdicts(found: Findings) -> list[str]:
    """A sentence or two for each depth and column, then what depth does to differences and rates."""
    lines = []
    for column in found.columns:
        where = f", {column}" if column else ""
        for depth in found.depths:
            places = [each for each in ranking(found, depth, column) if beats_bigram(found, each.finding)]
            if len(places) > 1:
                lines.append(f"Depth {depth}{where}: {_winner(places)}")
        lines += _gaps(found, column)
        lines += _transfers(found, column)
    if found.runs:
        lines.append(_divergence(found))
    return lines


def _winner(places: list[Place]) -> str:
    best = places[0]
    ties = [each for each in places[1:] if each.ties]
    words = f"{best.finding.arm} has the lowest loss, {_span(best)}"
    if ties:
        words += f"; a tie with {', '.join(f'{each.finding.arm} ({_by(each.behind)})' for each in ties)}"
    behind = [each for each in places[1:] if not each.ties]
    if behind:
        words += f"; behind it {', '.join(f'{each.finding.arm} ({_by(each.behind)})' for each in behind)}"
    return words + "."


def _span(place: Place) -> str:
    mean = place.mean
    return f"{mean.mean:.4f}" + (f" ({mean.low:.4f} to {mean.high:.4f})" if mean.half is not None else "")


def _by(difference: PairedDifference | None) -> str:
    if difference is None:
        return "not paired"
    half = f" ± {difference.half:.4f}" if difference.half is not None else ""
    return f"{difference.mean:+.4f}{half}"


def _gaps(found: Findings, column: str) -> list[str]:
    """How each arm's distance to the first one changes from the shallowest to the deepest depth."""
    lines, ends = [], (found.depths[0], found.depths[-1])
    if ends[0] == ends[1]:
        return []
    for arm in found.arms[1:]:
        gaps = []
        for depth in ends:
            own, base = found.at(arm, depth, column), found.at(found.arms[0], depth, column)
            if own is None or base is None or not all(_speaks(found, each) for each in (own, base)):
                break
            gaps.append({s: own.by_seed[s] - base.by_seed[s] for s in own.by_seed.keys() & base.by_seed.keys()})
        if len(gaps) < 2 or not (change := paired(gaps[1], gaps[0])):
            continue
        first, last = (statistics.fmean(gap.values()) for gap in gaps)
        inside = change.half is None or abs(change.mean) <= change.half
        words = "no change that the seeds show" if inside else f"a change of {_by(change)}"
        lines.append(
            f"{arm} against {found.arms[0]}: {first:+.4f} at depth {ends[0]}, {last:+.4f} at depth {ends[1]}: {words}."
        )
    return lines


def _speaks(found: Findings, finding: CellFinding) -> bool:
    """Whether a loss was confirmed, and says something of depth."""
    return found.mean(finding) is not None and beats_bigram(found, finding)


def _transfers(found: Findings, column: str) -> list[str]:
    if found.study.shapes.rule != "fixed_width":
        return []
    lines = []
    for arm in found.arms:
        fit = transfer(found, arm, column)
        if fit is None:
            continue
        half = f" ± {fit.half:.2f}" if fit.half is not None else ", two depths"
        few = len(found.depths) < FEWEST_DEPTHS
        lines.append(
            f"{arm}: the best rate falls as depth to the power {-fit.slope:.2f}{half}"
            + ("; too few depths to go beyond them." if few else f"; {_held_out(found, arm, column)}")
        )
    return lines


def _held_out(found: Findings, arm: str, column: str) -> str:
    """The error of the line through all depths but the deepest, there."""
    from stablelm.study.statistics import line

    cells = [each for depth in found.depths if (each := found.at(arm, depth, column)) and each.best_rate]
    points = [(math.log(each.depth), math.log(each.best_rate or math.nan)) for each in cells]
    fit = line(points[:-1])
    if fit is None:
        return "nothing held out."
    factor = math.exp(abs(fit.at(points[-1][0]) - points[-1][1]))
    return f"the line through the others misses the rate at depth {cells[-1].depth} by a factor of {factor:.2f}."


def _divergence(found: Findings) -> str:
    bad = diverged(found)
    flat = [each for each in found.runs if each["outcome"] == results.NOTHING_LEARNT]
    return (
        f"Of {len(found.runs)} runs {len(bad)} diverged and {len(flat)} ended less than {results.LEARNT} nats below "
        "the unigram model."
    )
