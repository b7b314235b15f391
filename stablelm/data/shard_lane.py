"""A lane over prepared shards: the order of `lanes.Lane`, with the tokens of many documents at a time."""

from collections.abc import Iterator

import numpy as np

from stablelm.data.order import Chunk, Cursor, Entries, Order, is_inside, row_is_gone
from stablelm.data.shards.shard_reader import PART, Shard, SharedShards

BLOCKS = 8  # blocks whose rows are looked up together


class ShardLane:
    """Documents of one lane. `shared` holds the open shards of the process."""

    def __init__(self, order: Order, lane: int, shared: SharedShards):
        self._order, self._lane, self._shared = order, lane, shared

    def chunks(self, start: Cursor, *, whole_blocks: bool = False) -> Iterator[Chunk]:
        """Tokens from the document of `start` on, endlessly; with `whole_blocks` a chunk is the rest of a block.

        Raises DataError when a shard cannot be read, is damaged or of another tokenizer, when the document of
        `start` is not there any more, or when the lane meets no document in as many entries as an epoch has.
        """
        order, size = self._order, self._order.shuffle_block
        blocks, limit = (1, None) if whole_blocks else (BLOCKS, PART)
        entries, resumed = Entries(order, self._lane), is_inside(start)
        for epoch, entry, block, index in entries.walk(start):
            file, share = order.locate(epoch, entry)
            shard, last = self._shared.shard(order.files[file]), False
            while not last:
                numbers = np.concatenate(
                    [self._numbers(shard, epoch, file, share, block + each) for each in range(blocks)]
                )
                if resumed and index >= len(numbers):
                    raise row_is_gone(shard.url, order.block(block).start + share + index * order.shares)
                resumed, last = False, len(numbers) < size * blocks
                rows = shard.take(numbers[index:])
                for first, tokens, ends in rows.parts(limit):
                    entries.found = entries.found or len(tokens) > 0
                    yield Chunk(Cursor(epoch, entry, block, index + first, 0), tokens, ends, size)
                index, block = 0, block + blocks

    def _numbers(self, shard: Shard, epoch: int, file: int, share: int, block: int) -> np.ndarray:
        """Numbers of a share's rows of a block, in its order, (rows,)."""
        there = self._order.block(block)
        count = max(0, min(there.stop, shard.footer.rows) - there.start)
        return self._order.dealt(epoch, file, share, block, count) + there.start
