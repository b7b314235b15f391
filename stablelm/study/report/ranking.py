"""Which arm is best at each depth: paired by seed, validation text drawn again, adjusted for several comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stablelm.study.report.findings import CellFinding, Findings
from stablelm.study.statistics import DRAWS, MeanInterval, PairedDifference, holm, paired

LEVEL = 0.05


@dataclass(frozen=True)
class Place:
    """An arm at a depth; `behind`: its loss less that of the best arm, paired by seed, with the adjusted p."""

    finding: CellFinding
    mean: MeanInterval
    behind: PairedDifference | None
    p: float | None
    share_best: float

    @property
    def ties(self) -> bool:
        """Whether it cannot be told from the best: its difference lies inside the interval, or is not significant."""
        if self.behind is None:
            return True  # it is the best
        if self.behind.half is None or self.p is None:
            return True
        return abs(self.behind.mean) <= self.behind.half or self.p > LEVEL


def ranking(found: Findings, depth: int, column: str) -> list[Place]:
    """From the lowest mean on; arms without confirmed, finite losses are left out."""
    cells = [cell for arm in found.arms if (cell := found.at(arm, depth, column))]
    means = [(cell, mean) for cell in cells if (mean := found.mean(cell)) is not None]
    if not means:
        return []
    means.sort(key=lambda pair: pair[1].mean)
    best, others = means[0][0], [cell for cell, _ in means[1:]]
    behind = {cell.arm: paired(cell.by_seed, best.by_seed) for cell in others}
    adjusted = holm({arm: each.p for arm, each in behind.items() if each is not None and each.p is not None})
    shares = shares_best([cell for cell, _ in means])
    return [
        Place(cell, mean, behind.get(cell.arm), adjusted.get(cell.arm), share)
        for (cell, mean), share in zip(means, shares, strict=True)
    ]


def shares_best(cells: Sequence[CellFinding], seed: int = 0) -> list[float]:
    """How often each has the lowest loss when seeds and validation windows are drawn again, the same for all."""
    seeds = sorted(set.intersection(*(set(cell.by_seed) for cell in cells)))
    if not seeds:
        return [math.nan] * len(cells)
    losses = _windows(cells, seeds)
    draw = np.random.default_rng(seed)
    won = np.zeros(len(cells))
    for _ in range(DRAWS):
        rows = draw.integers(0, len(seeds), len(seeds))
        weights = np.bincount(draw.integers(0, losses.shape[2], losses.shape[2]), minlength=losses.shape[2])
        won[int((losses[:, rows].mean(axis=1) @ weights).argmin())] += 1
    return [float(share) for share in won / DRAWS]


def _windows(cells: Sequence[CellFinding], seeds: Sequence[int]) -> np.ndarray:
    """(cells, seeds, windows); one window, the mean, where a run lacks them."""
    runs = [{each["seed"]: each for each in cell.confirming} for cell in cells]
    parts = [[(own[seed].get("layers") or {}).get("windows") for seed in seeds] for own in runs]
    sizes = {len(part) if part else 0 for row in parts for part in row}
    if len(sizes) == 1 and sizes != {0}:
        return np.array(parts)
    return np.array([[[own[seed]["val_loss"]] for seed in seeds] for own in runs], float)
