"""Everything that the loop works with, built from a prepared configuration."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stablelm.checkpoint import retention
from stablelm.checkpoint.background import Saver
from stablelm.checkpoint.best import to_state
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.config.durations import parse_duration
from stablelm.config.load import dump
from stablelm.config.schema import Config, TrainConfig
from stablelm.config.segments import segments_of
from stablelm.data import validation
from stablelm.data.loader import Loader
from stablelm.data.storage.options import SeenFiles
from stablelm.data.validation import ValidationSet
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.process.torch_settings import GarbageCollection
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.tasks.choice_items import ChoiceTask
from stablelm.evaluate.validation_text import validation_options
from stablelm.observe.interval_metrics import peak_memory
from stablelm.observe.layers import LayerObserver, rows_for
from stablelm.observe.own_metrics import OwnMetrics
from stablelm.observe.page.run_page import RunPage
from stablelm.observe.profile.parts import calls
from stablelm.observe.profile.profiler import Profiler, tabulator
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import Records
from stablelm.supervise.faults import Faults
from stablelm.supervise.heartbeat import Watchdog
from stablelm.supervise.progress_marker import ProgressMarker
from stablelm.supervise.shutdown import Ending
from stablelm.train import growth, resume
from stablelm.train.guards import Guard
from stablelm.train.prepare import Prepared
from stablelm.train.samples import Samples, build_samples
from stablelm.train.schedule import TrainHistory
from stablelm.train.step import seed_dropout
from stablelm.train.stop import Outcome, Stop, deadline

SAVES_WAITED = 10
"""A save that takes up to this many times its expected length is not a hang."""


@dataclass
class Job:
    """Everything the loop works with; `build_job` makes it."""

    prepared: Prepared
    ranks: Ranks
    engine: Engine
    loader: Loader
    progress: Progress
    guard: Guard
    records: Records
    stop: Stop
    faults: Faults
    watchdog: Watchdog
    saver: Saver
    validation: dict[str, ValidationSet]
    samples: Samples
    profiler: Profiler
    layers: LayerObserver
    own_metrics: OwnMetrics
    page: RunPage
    collection: GarbageCollection
    settings: Callable[[int], TrainConfig]
    """Of each optimizer step: where the run changed at a checkpoint, earlier steps have what they had."""
    keep_kernels: Callable[[], None] = lambda: None
    """Keeps what has been compiled for the next attempt."""

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def tasks(self) -> Mapping[str, ChoiceTask]:
        return self.prepared.tasks

    def save(self, wait: bool) -> None:
        """Saves the current state unless that is done; returns once it is committed, or without `wait` as soon as
        training can continue."""
        progress = self.progress
        self.keep_kernels()
        self.faults.saving(progress.step)
        self.saver.wait()
        if progress.checkpointed_step == progress.step:
            return
        assert self.prepared.corpora is not None
        lanes: dict[str, list[int]] = {}
        for part in self.ranks.gather(self.loader.state()):
            lanes |= part["lanes"]
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "skipped_rows": progress.skipped_rows,
            "data": {"data_step": self.loader.state()["data_step"], "lanes": lanes},
            "identity": self.prepared.corpora.identity,
            "guards": self.guard.state(),
            "evaluation_due": progress.evaluation_due,
            "evaluations": to_state(progress.evaluations, progress.step, self.config.evaluate.best),
        }
        self.saver.save(progress.step, self.engine.tensors(), state, dump(self.prepared.asked), wait=wait)

    def rewind(self, spike: Outcome) -> bool:
        """Returns to the newest checkpoint; False, and nothing is changed, if there is none."""
        return resume.rewind(spike, self.saver, self.engine, self.loader, self.ranks, self.progress, self.guard)


def build_job(
    prepared: Prepared,
    ranks: Ranks,
    ending: Ending,
    watchdog: Watchdog,
    fence: Fence,
    checkpoint: CheckpointPath | None,
    started: float,
    notices: Sequence[str],
) -> Job:
    """The run at `checkpoint` (None: at its beginning), after a dry run of one micro-batch and a save. Collective.

    `started`: seconds since 1970; `notices` go to the terminal first; `ending.extra` gets the number of parameters.
    """
    config, progress = prepared.config, ending.progress
    assert prepared.corpora is not None
    loader, engine = build_loader(prepared, ranks), build_engine(config, prepared.kind, ranks)
    ending.extra["params"] = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters())
    guard = Guard(config.guards, progress, lambda text: records.message(text))
    if checkpoint is not None:
        resume.load_checkpoint(checkpoint, engine, loader, ranks, progress, guard)
    elif config.run.init_from:
        resume.weights_from(config.run.init_from, engine, ranks)
    elif config.run.grow_from:
        growth.grown_from(config.run, engine, config.model, ranks)
    records = Records(config, progress, first_rank=ranks.is_first)
    for line in (*notices, _opening(prepared, ending.extra["params"], checkpoint)):
        records.message(line)
    stop = Stop(ranks, deadline=deadline(parse_duration(config.run.time_limit), started))
    stop.listen(ending.at_once)
    faults = Faults(config, ranks, progress.attempt)
    page = RunPage(config.run.dir, enabled=config.observe.page and ranks.is_first, message=records.message)
    ending.closing = page.finish
    saver = build_saver(prepared, fence, ranks, progress, faults, watchdog.marker)
    own_metrics = OwnMetrics(config, engine, ranks)
    watchdog.marker.at("dry run", progress.step)
    records.message(dry_run(config, engine, ranks, saver, own_metrics.before_update(progress.step, progress.tokens)))
    own_metrics.take()
    watchdog.extra_seconds["save"] = SAVES_WAITED * saver.seconds
    stop.save_seconds = saver.margin_seconds
    return Job(
        prepared, ranks, engine, loader, progress, guard, records, stop, faults, watchdog, saver,
        validation=read_validation(prepared), samples=build_samples(prepared, engine),
        profiler=_profiler(config, engine, loader, ranks, records, progress.step),
        layers=_layers(prepared, engine, ranks, records), own_metrics=own_metrics, page=page,
        collection=GarbageCollection(config.engine.gc_every, ranks.device),
        settings=TrainHistory(config.train, segments_of(prepared.corpora.identity)).at,
    )  # fmt: skip


def _opening(prepared: Prepared, parameters: int, checkpoint: CheckpointPath | None) -> str:
    """One line: what trains on what, and from where."""
    model, origin = prepared.config.model, f"resumed from {checkpoint}" if checkpoint else "new run"
    return (
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {parameters / 1e6:.2f} M parameters, "
        f"engine {prepared.kind} on {prepared.launch.world_size} process(es), {prepared.config.train.precision}"
        f"{', compiled' * bool(prepared.config.train.compile)}; {origin}"
    )


def dry_run(
    config: Config, engine: Engine, ranks: Ranks, saver: Saver, before_update: Callable[[], None] | None = None
) -> str:
    """Runs one full micro-batch forward and backward and writes a sample of a checkpoint; changes nothing.

    Returns a line with time and memory; `saver` knows about how long a save takes. Raises StorageError if the
    checkpoint directory cannot take a checkpoint.
    """
    started = time.perf_counter()
    rows = config.train.micro_batch_size or config.train.batch_sizes.largest // ranks.world_size
    seed_dropout(config.run.seed, 0, 0, ranks.rank)
    tokens = torch.randint(0, config.model.vocab_size or 1, (rows, config.data.seq_len + 1)).to(engine.device)
    engine.begin(None)
    sums = engine.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
    engine.backward(sums.total / sums.valid, last=True)
    if before_update is not None:
        before_update()
    engine.clear_gradients()
    computed = time.perf_counter() - started
    saved = saver.dry_run(engine.tensors())
    return (
        f"dry run: {rows} x {config.data.seq_len} tokens forward and backward {computed:.1f} s, "
        f"peak memory {peak_memory(engine.device) / 2**30:.2f} GiB, "
        f"a save of {saved.bytes / 2**20:.0f} MiB about {saver.seconds:.2f} s"
    )


def build_loader(prepared: Prepared, ranks: Ranks) -> Loader:
    """The stream of this rank's batches."""
    assert prepared.corpora is not None
    return Loader(
        prepared.corpora.train,
        prepared.tokenizer,
        prepared.config.data,
        seed=prepared.config.run.seed,
        global_batch_size=prepared.config.train.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seen=SeenFiles.of(prepared.config.run.dir),
    )


def first_rows(prepared: Prepared, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The first windows of the training text, (rows, seq_len) tokens and targets, for any batch size and ranks."""
    config = prepared.config
    assert prepared.corpora is not None
    data = replace(config.data, seq_len=seq_len, workers=0)
    files = prepared.corpora.train
    loader = Loader(files, prepared.tokenizer, data, seed=config.run.seed, global_batch_size=rows)
    batch = loader.next()
    loader.close()
    return batch.tokens, batch.targets


def layers_batch(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The fixed batch on which layers are measured: the run's first rows."""
    seq_len = prepared.config.data.seq_len
    return first_rows(prepared, rows_for(seq_len), seq_len)


def read_validation(prepared: Prepared) -> dict[str, validation.ValidationSet]:
    """Every validation set, the same on all ranks."""
    config = prepared.config
    assert prepared.corpora is not None
    seen = SeenFiles.of(config.run.dir)
    return {
        name: validation.read(
            files,
            prepared.tokenizer,
            seq_len=config.data.seq_len,
            sequences=config.evaluate.batches * config.train.batch_sizes.first,
            options=replace(validation_options(config, name), seen=seen),
        )
        for name, files in prepared.corpora.validation.items()
    }


def build_saver(
    prepared: Prepared, fence: Fence, ranks: Ranks, progress: Progress, faults: Faults, marker: ProgressMarker
) -> Saver:
    """Saves this attempt's steps and keeps as many as configured."""
    checkpoint, best = prepared.config.checkpoint, prepared.config.evaluate.best

    def committed(step: int) -> None:
        progress.checkpointed_step = step
        faults.saved(step)

    return Saver(
        fence,
        ranks.save_group,
        shapes=expected_shapes(prepared.config.model, prepared.config.train),
        background=checkpoint.async_,
        committed=committed,
        reached=marker.saved_part,
        retain=lambda: retention.retain(fence.root, checkpoint.keep, checkpoint.keep_permanent_every, best=best),
    )


def _layers(prepared: Prepared, engine: Engine, ranks: Ranks, records: Records) -> LayerObserver:
    return LayerObserver(
        engine,
        ranks,
        every=prepared.config.observe.layers_every,
        sharpness_every=prepared.config.observe.sharpness_every,
        batch=lambda: layers_batch(prepared),
        pieces=prepared.tokenizer.pieces,
        record=records.write,
    )


def _profiler(
    config: Config, engine: Engine, loader: Loader, ranks: Ranks, records: Records, finished: int
) -> Profiler:
    return Profiler(
        Path(config.run.dir),
        config.observe,
        ranks.rank,
        finished,
        calls=lambda: calls(engine, loader, compiled=config.train.compile is True),
        tabulate=tabulator(config, engine.device, ranks.rank, ranks.world_size),
        tell=records.message,
    )
