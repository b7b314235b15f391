"""Several sources of text in one run: which of them each sample comes from.

Sample n takes the source in whose part of [0, 1) the n-th point of a Weyl sequence falls (multiples of the golden
ratio, from a start that depends on the seed): so the shares of any stretch of samples are as near to the weights as
whole samples allow, and depend on neither world size nor what was read before.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from stablelm.config.mixture import Source, weight_at
from stablelm.data.order import Cursor, Place
from stablelm.data.packing import Windows

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class Mixture:
    """`stages`: (first data step, running sums of the sources' weights, which end at 1), ascending from step 0."""

    names: tuple[str, ...]
    stages: tuple[tuple[int, tuple[float, ...]], ...]
    start: int

    @classmethod
    def of(cls, sources: Mapping[str, Source], *, seed: int) -> "Mixture":
        """The mixture of these sources; at each stage their weights count in proportion."""
        stages = []
        for step in sorted({0, *(step for source in sources.values() for step in source.weights)}):
            weights = [weight_at(source, step) for source in sources.values()]
            stages.append((step, tuple(part / sum(weights) for part in accumulate(weights))))
        key = hashlib.shake_256(f"mixture\0{seed}".encode()).digest(8)
        return cls(tuple(sources), tuple(stages), int.from_bytes(key, "little"))

    def shares(self, steps: int) -> dict[str, float]:
        """Each source's part of the samples of so many steps."""
        told = dict.fromkeys(self.names, 0.0)
        ends = [first for first, _ in self.stages[1:]] + [steps]
        for (first, sums), end in zip(self.stages, ends, strict=True):
            length = max(0, min(end, steps) - min(first, steps)) / steps
            for name, part in zip(self.names, np.diff(sums, prepend=0.0), strict=True):
                told[name] += float(part) * length
        return told

    def source(self, sample: int, data_step: int) -> str:
        """The source of a sample, which belongs to the batch of `data_step`."""
        point = (self.start + sample * GOLDEN) % 2**64 / 2**64
        sums = next(sums for first, sums in reversed(self.stages) if first <= data_step)
        # Above the last sum only by rounding; a source without a weight repeats the sum before it.
        return self.names[bisect_right(sums, min(point, sums[-1] * (1 - 2**-53)))]


class Cursors(dict[str, Cursor]):
    """The cursors of one lane in each source."""

    def to_list(self) -> dict[str, list[int]]:
        return {name: cursor.to_list() for name, cursor in self.items()}

    def cursor(self) -> "Cursors":
        """Itself, as of any place."""
        return self


class Places(NamedTuple):
    """The places of one lane in each source."""

    parts: dict[str, Place]

    def cursor(self) -> Cursors:
        return Cursors((name, place.cursor()) for name, place in self.parts.items())


class MixedWindows:
    """Windows of one lane out of several sources; see `packing.Windows`.

    `given`: windows of this lane before the next one; `lanes`, `batch`: numbers of the whole run.
    """

    def __init__(
        self, parts: dict[str, Windows], mixture: Mixture, *, lane: int, lanes: int, batch: int, given: int
    ) -> None:
        self._parts, self._mixture = parts, mixture
        self._lane, self._lanes, self._batch, self._given = lane, lanes, batch, given
        self._last = next(iter(parts.values()))

    @property
    def place(self) -> Places:
        return Places({name: windows.place for name, windows in self._parts.items()})

    @property
    def filled(self) -> int:
        return self._last.filled

    @property
    def borders(self) -> np.ndarray:
        return self._last.borders

    @property
    def skipped(self) -> int:
        return self._last.skipped

    def next(self) -> np.ndarray:
        sample = self._given * self._lanes + self._lane
        self._last = self._parts[self._mixture.source(sample, sample // self._batch)]
        self._given += 1
        return self._last.next()
