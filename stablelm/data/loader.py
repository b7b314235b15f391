"""Batches of one rank, in an order that depends on neither world size nor workers.

Sample n, counted over the batches of all data steps, comes from lane n mod Λ. Rank r of W owns the lanes ≡ r and so
the rows ≡ r mod W, since W divides every batch. Workers, threads or processes, each serve some of the rank's lanes, so
a lane has one reader.

The path of a token, from the training loop to the file that opens a URL. Each function leads to the next one, so that a
debugger can step into it with data.workers=0; otherwise threads of `workers.RowProducer` call `LaneRows` ahead of time.
With several sources `mixture.MixedWindows` chooses one before `Packer`; `mixture.RunText` builds all of it.
`order.Order` alone decides which document comes next. With at least as many files as lanes each lane reads its own by
`FileRows`; a file on the hub or in S3 is a `HubFile` or `S3File` in place of an `HttpFile`.

    train/loop.py                 train                  asks for a batch
    data/loader.py                Loader.next            joins the rows of a rank
    data/packing.py               LaneRows.take          gives each row a window, which Packer.next_window cuts
    data/batched_tokenization.py  LaneTokens.next_chunk  tokenizes documents of several lanes in one call
    data/order.py                 TextLane.next_group    reads documents in the order of Order
    data/formats/file_rows.py     SharedFiles.take       keeps the rows of a file, which FileRows reads
    data/formats/text_lines.py    lines_from             splits text into lines
    data/formats/inflate.py       pieces                 inflates gzip and zstandard
    data/storage/range_file.py    RangeFile.slices       reads and retries byte ranges; open_file opens
    data/storage/http_file.py     HttpFile               opens the URL and fetches the ranges

Prepared tokens go from `packing` to `order.ShardLane` and `shards/shard_reader.py`, then to `storage/range_file.py`.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stablelm.config.batch_sizes import BatchSizes, Given
from stablelm.config.schema import DataConfig
from stablelm.data.mixture import RunText, of_source
from stablelm.data.order import Cursor, TokenPosition
from stablelm.data.packing import BatchRow, LaneRows, SourceCursors, SourcePositions
from stablelm.data.storage.options import SeenFiles
from stablelm.data.workers import RowProducer, WorkerProcess, WorkerTask, allow_open_files
from stablelm.model.targets import IGNORED
from stablelm.tokenizers.interface import Encoder, count_unknown

if TYPE_CHECKING:
    import torch


# Bad rows that were passed over, tokens that no piece of the tokenizer can write, and all tokens.
COUNTS: tuple[str, ...] = ("skipped_rows", "unknown_tokens", "input_tokens")


@dataclass(frozen=True)
class Batch:
    """Rows of one rank for one step: int64 (rows, seq_len); targets are the tokens that follow.

    Row i is row rank + i * world_size of the global batch `data_step`, counted from 0. Tokens and targets may
    share memory and are not to be written to. With best-fit packing a target of -100 is not counted: it would be
    padding or the first token of another document. `documents`, if requested, is int32 (rows, seq_len): the
    number of the document within its row to which each token belongs; padding counts as one.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    data_step: int
    documents: "torch.Tensor | None" = None


class Loader:
    """Endless batches of a rank; `world_size` must divide `data.lanes` and every global batch size.

    `files` are text, or all of them prepared shards; with `data.mixture` they are given by source.
    `documents`: number the documents in each batch. `seen`: the files that earlier attempts of the run read.
    `next` raises DataError when text became unavailable or is damaged; the loader is closed then.
    `wait_seconds` is the time the last `next` took to get its rows.
    """

    def __init__(
        self,
        files: list[str] | Mapping[str, list[str]],
        tokenizer: Encoder,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: Given,
        rank: int = 0,
        world_size: int = 1,
        documents: bool = False,
        seen: SeenFiles | None = None,
    ):
        assert data.lanes % world_size == 0
        sizes = BatchSizes.of(global_batch_size)
        assert not any(size % world_size for _, size in sizes.stages)
        self.wait_seconds = 0.0
        self._data = data
        sources = dict(files) if isinstance(files, Mapping) else {"": files}
        self._text = RunText(sources, tokenizer, data, seed, sizes, seen)
        self._orders = self._text.orders()
        self._lanes = range(rank, data.lanes, world_size)
        self._sizes, self._world_size = sizes, world_size
        self._documents = documents
        self._padding = self._given = 0  # tokens and windows
        self._counts = dict.fromkeys(COUNTS, 0)
        self._data_step = 0
        self._cursors: dict[int, Cursor | SourceCursors] = {}  # where it began
        self._positions: dict[
            int, TokenPosition | SourcePositions | Cursor | SourceCursors
        ] = {}  # of lanes that have moved since
        self._source: LaneRows | RowProducer | None = None  # of rows
        self._skipped: list[tuple[int, int]] = []
        self._closed = False

    def skip(self, windows: Iterable[Sequence[int]]) -> None:
        """`next` passes over these batches, given as (first data step, how many), in place of those given before."""
        self._skipped = [(first, first + count) for first, count in windows]

    def next(self) -> Batch:
        """The batch of the next data step that is not skipped."""
        batch = self._batch()
        while self._skipped and any(first <= batch.data_step < stop for first, stop in self._skipped):
            batch = self._batch()
        return batch

    def _batch(self) -> Batch:
        import torch

        assert not self._closed
        if self._source is None:
            self._source = self._start()
        began = time.perf_counter()
        try:
            rows = self._source.take(self._rows(self._data_step))
        except BaseException:
            self.close()
            raise
        self.wait_seconds = time.perf_counter() - began
        self._positions.update([(row.lane, row.position) for row in rows])
        # Joined and counted in the type they come in, then widened; tokens and targets are views of the same memory.
        narrow = np.concatenate([row.window for row in rows]).reshape(len(rows), -1)
        self._count(rows, narrow[:, :-1])
        windows = narrow.astype(np.int64)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        if self._data.packing == "best_fit":
            targets = _best_fit_targets(rows, targets)
            self._padding += sum(self._data.seq_len + 1 - row.filled for row in rows)
        numbers = torch.from_numpy(_document_numbers(rows, self._data.seq_len)) if self._documents else None
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), self._data_step, numbers)
        self._given += len(rows)
        self._data_step += 1
        return batch

    def _rows(self, data_step: int) -> range:
        """Numbers of this rank's rows of a batch."""
        samples = self._sizes.samples(data_step)
        return range(samples.start // self._world_size, samples.stop // self._world_size)

    def _count(self, rows: list[BatchRow], tokens: np.ndarray) -> None:
        self._counts["skipped_rows"] += sum([row.skipped for row in rows])
        self._counts["unknown_tokens"] += count_unknown(self._text.tokenizer, tokens)
        self._counts["input_tokens"] += tokens.size

    def counts(self) -> dict[str, int]:
        """COUNTS of this rank's batches since the last call, or since `load`."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    @property
    def padding_share(self) -> float:
        """Share of the tokens of all batches so far that are padding; 0 but for best-fit packing."""
        return self._padding / max(1, self._given * (self._data.seq_len + 1))

    def state(self) -> dict[str, Any]:
        """Where the next batch begins: `data_step` and the cursors of this rank's lanes that have moved."""
        cursors = self._cursors | {lane: position.cursor() for lane, position in self._positions.items()}
        lanes = {str(lane): cursor.to_list() for lane, cursor in sorted(cursors.items())}
        return {"data_step": self._data_step, "lanes": lanes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state whose `lanes` are the union over the ranks of any world size."""
        self._stop()
        self._counts = dict.fromkeys(COUNTS, 0)
        self._data_step = int(state["data_step"])
        saved = ((int(lane), _read_cursor(cursor)) for lane, cursor in state["lanes"].items())
        self._cursors, self._positions = {lane: cursor for lane, cursor in saved if lane in self._lanes}, {}

    def close(self) -> None:
        """Stops the workers; no batches can be taken afterwards."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _start(self) -> LaneRows | RowProducer:
        allow_open_files(len(self._lanes) * len(self._orders))
        workers = min(self._data.workers, len(self._lanes))
        if workers == 0:
            return self._task(range(len(self._lanes))).maker()
        processes = self._data.worker_kind == "process"
        return RowProducer(
            self._processes(workers) if processes else self._threads(workers),
            len(self._lanes),
            self._data_step,
            self._rows,
            # At least one batch ahead: with 0 no worker could start.
            ahead=max(self._data.prefetch, 1),
            # A process has the next request before its answer is taken, so that it does not stand idle.
            depth=2 if processes else 1,
        )

    def _task(self, mine: range) -> WorkerTask:
        borders = self._documents or self._data.packing == "best_fit"
        cursors = {self._lanes[index]: self._cursors.get(self._lanes[index]) for index in mine}
        known = {lane: cursor for lane, cursor in cursors.items() if cursor is not None}
        return WorkerTask(self._text, mine, self._lanes, known, self._data_step, borders)

    def _threads(self, count: int) -> list[LaneRows]:
        """Threads share what they read of files that several lanes need."""
        everything = self._task(range(len(self._lanes))).maker(threads=count)
        return [everything.share(range(index, len(self._lanes), count)) for index in range(count)]

    def _processes(self, count: int) -> list[WorkerProcess]:
        shares = (range(index, len(self._lanes), count) for index in range(count))
        return [WorkerProcess(self._task(mine)) for mine in shares]

    def epochs(self) -> dict[str, float]:
        """How often each source was read, by name ('' for the only one): the mean over this rank's lanes.

        Whole entries count, so a lane that is in the middle of a file counts it as not read.
        """
        moved = self._cursors | {lane: position.cursor() for lane, position in self._positions.items()}
        turns_of = {}
        for name, order in self._orders.items():
            cursors = [of_source(moved.get(lane), name) for lane in self._lanes]
            turns = [order.turns(cursor) if cursor else 0.0 for cursor in cursors]
            turns_of[name] = sum(turns) / len(turns)
        return turns_of


def _read_cursor(saved: Any) -> Cursor | SourceCursors:
    """A lane's entry in a saved state: of the only source, or of each of several."""
    if isinstance(saved, Mapping):
        return SourceCursors((name, Cursor(*cursor)) for name, cursor in saved.items())
    return Cursor(*saved)


def _document_numbers(rows: list[BatchRow], seq_len: int) -> np.ndarray:
    """int32 (rows, seq_len): counted from 0 in each row; padding is a document of its own."""
    numbers = np.zeros((len(rows), seq_len), np.int32)
    for row, marks in zip(rows, numbers, strict=True):
        marks[row.borders] = 1
        if row.filled < seq_len:
            marks[row.filled] = 1
    return numbers.cumsum(axis=1, dtype=np.int32)


def _best_fit_targets(rows: list[BatchRow], targets: np.ndarray) -> np.ndarray:
    """A copy of `targets` without those that begin a document or are padding."""
    targets = targets.copy()
    for row, values in zip(rows, targets, strict=True):
        values[row.borders - 1] = IGNORED
        values[row.filled - 1 :] = IGNORED
    return targets
