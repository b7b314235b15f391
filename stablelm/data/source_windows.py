"""Windows of every lane over the files of one source: text or prepared shards, joined and split or packed."""

from dataclasses import replace

from stablelm.config.schema import DataConfig
from stablelm.data.batched_tokenization import Together, block_chunks
from stablelm.data.best_fit import BestFitPacker
from stablelm.data.encoding import Encoder
from stablelm.data.formats.file_rows import SharedFiles
from stablelm.data.order import Cursor, Lane, Order
from stablelm.data.packing import Packer, Windows
from stablelm.data.shard_lane import ShardLane
from stablelm.data.shards.shard_format import is_shard
from stablelm.data.shards.shard_reader import SharedShards
from stablelm.data.storage.options import ReadOptions


class SourceWindows:
    """What the lanes of a process share of a source; `lanes` of them are here, `options` say how they read."""

    def __init__(self, order: Order, tokenizer: Encoder, data: DataConfig, *, lanes: int, options: ReadOptions):
        self._order, self._tokenizer, self._data, self._options = order, tokenizer, data, options
        self._shared: SharedFiles | SharedShards
        if all(map(is_shard, order.files)):
            self._shared = SharedShards(tokenizer.sha256, lanes=lanes, options=options)
        else:
            self._shared = SharedFiles(len(order.files), options=options)

    def of(self, lane: int, start: Cursor | None, together: Together) -> Windows:
        """The windows of a lane, from its beginning or from `start` on."""
        start = start or self._order.start(lane)
        best_fit = self._data.packing == "best_fit"
        first = replace(start, index=0) if best_fit else start
        if isinstance(self._shared, SharedShards):
            chunks = ShardLane(self._order, lane, self._shared).chunks(first, whole_blocks=best_fit)
        else:
            text = Lane(self._order, lane, self._shared, options=self._options)
            if best_fit:
                chunks = block_chunks(text.groups(first), self._tokenizer)
            else:
                chunks = together.chunks(text.groups(first, together.counts()))
        if best_fit:
            return BestFitPacker(chunks, self._data.seq_len, self._tokenizer.eos, start)
        return Packer(chunks, self._data.seq_len, start)
