"""The windows of a run's lanes, put together from its sources: which source each sample comes from.

Sample n takes the source in whose part of [0, 1) the n-th point of a Weyl sequence falls (multiples of the golden
ratio, from a start that depends on the seed): so the shares of any stretch of samples are as near to the weights as
whole samples allow, and depend on neither world size nor what was read before.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from stablelm.config.batch_sizes import BatchSizes
from stablelm.config.mixture import Source, weight_at
from stablelm.config.mixture import sources as configured_sources
from stablelm.config.schema import DataConfig
from stablelm.data.batched_tokenization import BatchedTokenization, BlockTokens
from stablelm.data.formats.file_rows import SharedFiles
from stablelm.data.order import Cursor, Order, ShardLane, TextLane
from stablelm.data.packing import BestFitPacker, LaneWindows, Packer, SourceCursors, SourcePositions
from stablelm.data.shards.shard_format import is_shard
from stablelm.data.shards.shard_reader import SharedShards
from stablelm.data.storage.options import ReadOptions, SeenFiles
from stablelm.tokenizers import Encoder

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
        shares = dict.fromkeys(self.names, 0.0)
        ends = [first for first, _ in self.stages[1:]] + [steps]
        for (first, sums), end in zip(self.stages, ends, strict=True):
            length = max(0, min(end, steps) - min(first, steps)) / steps
            for name, part in zip(self.names, np.diff(sums, prepend=0.0), strict=True):
                shares[name] += float(part) * length
        return shares

    def source(self, sample: int, data_step: int) -> str:
        """The source of a sample, which belongs to the batch of `data_step`."""
        point = (self.start + sample * GOLDEN) % 2**64 / 2**64
        sums = next(sums for first, sums in reversed(self.stages) if first <= data_step)
        # Above the last sum only by rounding; a source without a weight repeats the sum before it.
        return self.names[bisect_right(sums, min(point, sums[-1] * (1 - 2**-53)))]


class MixedWindows:
    """Windows of one lane out of several sources; see `packing.LaneWindows`.

    `given`: windows of this lane before the next one; `lanes`, `sizes`: of the whole run.
    """

    def __init__(
        self, parts: dict[str, LaneWindows], mixture: Mixture, *, lane: int, lanes: int, sizes: BatchSizes, given: int
    ) -> None:
        self._parts, self._mixture = parts, mixture
        self._lane, self._lanes, self._sizes, self._given = lane, lanes, sizes, given
        self._last = next(iter(parts.values()))

    @property
    def position(self) -> SourcePositions:
        return SourcePositions({name: windows.position for name, windows in self._parts.items()})

    @property
    def filled(self) -> int:
        return self._last.filled

    @property
    def borders(self) -> np.ndarray:
        return self._last.borders

    @property
    def skipped(self) -> int:
        return self._last.skipped

    def next_window(self) -> np.ndarray:
        sample = self._given * self._lanes + self._lane
        self._last = self._parts[self._mixture.source(sample, self._sizes.step_of(sample))]
        self._given += 1
        return self._last.next_window()


class SourceWindows:
    """What the lanes of a process share of a source; `lanes` of them are here, `options` say how they read."""

    def __init__(self, order: Order, tokenizer: Encoder, data: DataConfig, *, lanes: int, options: ReadOptions):
        self._order, self._tokenizer, self._data, self._options = order, tokenizer, data, options
        self._shared: SharedFiles | SharedShards
        if all(map(is_shard, order.files)):
            self._shared = SharedShards(tokenizer.sha256, lanes=lanes, options=options)
        else:
            self._shared = SharedFiles(len(order.files), options=options)

    def of(self, lane: int, start: Cursor | None, batch: BatchedTokenization) -> LaneWindows:
        """The windows of a lane, from its beginning or from `start` on; `batch` tokenizes it with others."""
        start, best_fit = start or self._order.start(lane), self._data.packing == "best_fit"
        first = replace(start, index=0) if best_fit else start
        chunks: Any  # of whole blocks if `best_fit`
        if isinstance(self._shared, SharedShards):
            chunks = ShardLane(self._order, lane, first, self._shared, whole_blocks=best_fit)
        else:
            documents = TextLane(self._order, lane, first, self._shared, options=self._options)
            chunks = BlockTokens(documents, self._tokenizer) if best_fit else batch.add(documents)
        if best_fit:
            return BestFitPacker(chunks, self._data.seq_len, self._tokenizer.eos, start)
        return Packer(chunks, self._data.seq_len, start)


@dataclass(frozen=True)
class RunText:
    """`files` by source: text, or all of a source prepared shards; the only source is called ''.

    Can be pickled if the tokenizer can.
    """

    files: Mapping[str, list[str]]
    tokenizer: Encoder
    data: DataConfig
    seed: int
    sizes: BatchSizes
    seen: SeenFiles | None = None

    def orders(self) -> dict[str, Order]:
        """The order of each source."""
        lanes, block = self.data.lanes, self.data.shuffle_block
        return {
            # Files of several sources may have the same names.
            name: Order(own, seed=f"{self.seed}/{name}" if name else self.seed, lanes=lanes, shuffle_block=block)
            for name, own in self.files.items()
        }

    def windows(
        self, lanes: Sequence[int], cursors: Mapping[int, Cursor | SourceCursors], data_step: int, *, threads: int = 1
    ) -> list[LaneWindows]:
        """The windows of these lanes from `cursors` on (absent: from a lane's beginning), for a process of its own.

        Thread i of so many must be the only one to use the windows ≡ i in the list.
        """
        options = replace(ReadOptions.of(self.data, lanes=len(lanes) * len(self.files)), seen=self.seen)
        shared = {
            name: SourceWindows(order, self.tokenizer, self.data, lanes=len(lanes), options=options)
            for name, order in self.orders().items()
        }
        turn = threading.Lock()
        batches = [
            {name: BatchedTokenization(self.tokenizer, threads=threads, turn=turn) for name in shared}
            for _ in range(threads)
        ]
        mixed = Mixture.of(configured_sources(self.data), seed=self.seed) if self.data.mixture else None
        made: list[LaneWindows] = []
        for index, lane in enumerate(lanes):
            parts = {
                name: source.of(lane, of_source(cursors.get(lane), name), batches[index % threads][name])
                for name, source in shared.items()
            }
            made.append(parts[""] if mixed is None else self._mixed(lane, parts, mixed, data_step))
        return made

    def _mixed(self, lane: int, parts: dict[str, LaneWindows], mixed: Mixture, data_step: int) -> MixedWindows:
        lanes, sizes = self.data.lanes, self.sizes
        given = max(0, -(-(sizes.before(data_step) - lane) // lanes))
        return MixedWindows(parts, mixed, lane=lane, lanes=lanes, sizes=sizes, given=given)


def of_source(cursor: Cursor | SourceCursors | None, name: str) -> Cursor | None:
    """The cursor of one source out of a lane's; there is only one without a mixture."""
    return cursor.get(name) if isinstance(cursor, SourceCursors) else cursor
