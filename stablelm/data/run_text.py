"""The text of a run: the windows of any of its lanes, from any place, in this process or another."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stablelm.config import mixture
from stablelm.config.schema import DataConfig
from stablelm.data.batched_tokenization import Together
from stablelm.data.encoding import Encoder
from stablelm.data.mixture import Cursors, MixedWindows, Mixture
from stablelm.data.order import Cursor, Order
from stablelm.data.packing import Windows
from stablelm.data.source_windows import SourceWindows
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.seen_files import SeenFiles


@dataclass(frozen=True)
class RunText:
    """`files` by source: text, or all of a source prepared shards; the only source is called ''.

    Can be pickled if the tokenizer can.
    """

    files: Mapping[str, list[str]]
    tokenizer: Encoder
    data: DataConfig
    seed: int
    global_batch_size: int
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
        self, lanes: Sequence[int], cursors: Mapping[int, Cursor | Cursors], data_step: int, *, threads: int = 1
    ) -> list[Windows]:
        """The windows of these lanes from `cursors` on (absent: from a lane's beginning), for a process of its own.

        Thread i of so many must be the only one to use the windows ≡ i in the list.
        """
        options = replace(ReadOptions.of(self.data, lanes=len(lanes) * len(self.files)), seen=self.seen)
        shared = {
            name: SourceWindows(order, self.tokenizer, self.data, lanes=len(lanes), options=options)
            for name, order in self.orders().items()
        }
        turn = threading.Lock()
        together = [
            {name: Together(self.tokenizer, threads=threads, turn=turn) for name in shared} for _ in range(threads)
        ]
        mixed = Mixture.of(mixture.sources(self.data), seed=self.seed) if self.data.mixture else None
        made: list[Windows] = []
        for place, lane in enumerate(lanes):
            parts = {
                name: source.of(lane, of_source(cursors.get(lane), name), together[place % threads][name])
                for name, source in shared.items()
            }
            made.append(parts[""] if mixed is None else self._mixed(lane, parts, mixed, data_step))
        return made

    def _mixed(self, lane: int, parts: dict[str, Windows], mixed: Mixture, data_step: int) -> MixedWindows:
        lanes, batch = self.data.lanes, self.global_batch_size
        given = max(0, -(-(data_step * batch - lane) // lanes))
        return MixedWindows(parts, mixed, lane=lane, lanes=lanes, batch=batch, given=given)


def of_source(cursor: Cursor | Cursors | None, name: str) -> Cursor | None:
    """The cursor of one source out of a lane's; there is only one without a mixture."""
    return cursor.get(name) if isinstance(cursor, Cursors) else cursor
