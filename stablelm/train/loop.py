"""The training loop: the page to read first."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stablelm.checkpoint.background import Saver
from stablelm.config.schema import Config
from stablelm.data.loader import Loader
from stablelm.data.validation import ValidationSet
from stablelm.engine.base import Engine
from stablelm.engine.mesh import Ranks
from stablelm.evaluate.perplexity import Scores, evaluate
from stablelm.observe.layers import LayerObserver
from stablelm.observe.profile import Profiler
from stablelm.train.meter import Meter
from stablelm.train.progress import Progress
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step
from stablelm.train.stop import Stop


@dataclass
class Job:
    """Everything the loop works with, built by `train.run`."""

    config: Config
    engine: Engine
    ranks: Ranks
    loader: Loader
    validation: dict[str, ValidationSet]
    progress: Progress
    stop: Stop
    profiler: Profiler
    layers: LayerObserver
    record: Callable[[dict[str, Any]], None]
    """Writes one record of metrics; does nothing except on rank 0."""
    saver: Saver
    save: Callable[[bool], None]
    """Saves the current state; with True it returns once that is committed, else as soon as training can go on."""


def train(job: Job) -> str:
    """Trains to the last step or an agreed stop; returns the reason of the stop, '' at the end."""
    config, progress = job.config, job.progress
    steps = config.train.steps
    assert steps is not None
    interval = Meter(job.engine.device, job.ranks, config, progress, job.record)
    while progress.step < steps:
        step = progress.step + 1
        started = time.perf_counter()
        batch = job.loader.next()
        result = train_step(
            job.engine,
            job.ranks,
            batch.tokens,
            batch.targets,
            step=step,
            lr=learning_rate(step, config.train),
            seed=config.run.seed,
            micro=config.train.micro_batch_size or len(batch.tokens),
        )
        progress.step = step
        progress.tokens += config.train.global_batch_size * config.data.seq_len
        interval.add(result, wait=job.loader.wait_seconds, seconds=time.perf_counter() - started)
        job.profiler.step(step)

        if due(step, config.observe.every, steps):
            interval.write(job.loader.epochs())
        if due(step, config.evaluate.every, steps):
            validate(job)
        job.layers.step(step, progress.tokens)
        reason = job.stop.agreed(failed=job.saver.failed) or ("run.stop_after" if step == config.run.stop_after else "")
        if due(step, config.checkpoint.every, steps) or reason:
            interval.write(job.loader.epochs())
            job.save(bool(reason) or step == steps)
        job.stop.margin_seconds = job.saver.margin_seconds + 3 * interval.slowest
        if reason and step < steps:
            job.stop.finish()
            return reason
    job.stop.finish()
    return ""


def due(step: int, every: int, last: int) -> bool:
    """Whether something done each `every` steps (0: never) and at the last one is due."""
    return step == last or (every > 0 and step % every == 0)


def validate(job: Job) -> dict[str, Scores]:
    """Scores of every validation set at the current step, recorded as `val_loss/<set>`."""
    scores = {
        name: evaluate(job.engine, job.ranks, data, job.config.evaluate.micro_batch_size)
        for name, data in job.validation.items()
    }
    if scores:
        job.progress.val_loss = {name: score.loss for name, score in scores.items()}
        values = {f"val_loss/{name}": score.loss for name, score in scores.items()}
        values |= {f"val_bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}
        job.record({"step": job.progress.step, "tokens": job.progress.tokens, **values})
    return scores
