"""The training loop: the page to read first."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stablelm.checkpoint.background import Saver
from stablelm.config.schema import Config
from stablelm.data.loader import Batch, Loader
from stablelm.data.validation import ValidationSet
from stablelm.engine.base import Engine
from stablelm.engine.mesh import Ranks
from stablelm.evaluate.perplexity import Scores, evaluate
from stablelm.observe.layers import LayerObserver
from stablelm.observe.profile import Profiler
from stablelm.train.agreement import Agreement, Outcome
from stablelm.train.faults import Faults
from stablelm.train.guards import Guard
from stablelm.train.meter import Meter
from stablelm.train.progress import Progress
from stablelm.train.recheck import recheck
from stablelm.train.records import Records
from stablelm.train.schedule import learning_rate
from stablelm.train.step import StepResult, train_step
from stablelm.train.stop import REASONS, Stop
from stablelm.train.watchdog import Watch


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
    guard: Guard
    faults: Faults
    watch: Watch
    profiler: Profiler
    layers: LayerObserver
    records: Records
    saver: Saver
    save: Callable[[bool], None]
    """Saves the current state; with True it returns once that is committed, else as soon as training can go on."""
    rewind: Callable[[Outcome], bool]
    """Returns to the newest checkpoint; False, and nothing is changed, if there is none."""


def train(job: Job) -> str:
    """Trains to the last step or an agreed stop; returns the reason of the stop, '' at the end."""
    config, progress, pulse = job.config, job.progress, job.watch.pulse
    steps = config.train.steps
    assert steps is not None
    records = job.records
    interval = Meter(job.engine.device, job.ranks, config, progress, records.write, job.watch.hosts, records.message)
    agreement = Agreement(job.ranks)
    while progress.step < steps:
        step = progress.step + 1
        started = time.perf_counter()
        pulse.at("data", step)
        batch = job.guard.next_batch(job.loader)
        pulse.at("step", step)
        job.faults.before(step)
        met = time.perf_counter()
        take = update(job, batch, step)
        result = take(largest_norm=job.guard.largest_norm(step))
        if config.guards.recheck:
            recheck(step, result, take, job.ranks, job.watch.hosts, job.records.message)
        progress.step = step
        progress.tokens += config.train.global_batch_size * config.data.seq_len
        interval.add(result, wait=job.loader.wait_seconds, own=met - started, seconds=time.perf_counter() - started)
        pulse.finished(step)
        job.profiler.step(step)

        if due(step, config.observe.every, steps):
            interval.write(job.loader)
        if due(step, config.evaluate.every, steps):
            validate(job)
        job.layers.step(step, progress.tokens)
        wish, outcomes = agreement.exchange(step, batch.data_step, result, job.stop.wish(failed=job.saver.failed))
        reason = REASONS[wish] or ("run.stop_after" if step == config.run.stop_after else "")
        saving = due(step, config.checkpoint.every, steps) or bool(reason)
        if saving:  # nothing that has not been judged
            interval.write(job.loader)
            outcomes += agreement.settle()
        spike = job.guard.judge(outcomes)
        stopping = bool(reason) and step < steps
        if spike is not None and not stopping and rewound(job, spike, agreement, interval):
            continue
        if saving:
            pulse.at("save", step)
            job.saver.wait()
            # A stop at a spike leaves it to the next attempt, which finds it again.
            if spike is None or not stopping or progress.checkpointed_step < 0:
                job.save(stopping or step == steps)
        job.stop.margin_seconds = job.saver.margin_seconds + 3 * interval.slowest
        if stopping:
            agreement.settle()
            return reason
    return ""


def update(job: Job, batch: Batch, step: int) -> Callable[..., StepResult]:
    """`train_step` of this batch, whose `largest_norm` is left to say."""
    config = job.config
    return partial(
        train_step,
        job.engine,
        job.ranks,
        batch.tokens,
        batch.targets,
        step=step,
        lr=learning_rate(step, config.train),
        seed=config.run.seed,
        micro=config.train.micro_batch_size or len(batch.tokens),
        loss_factor=job.faults.loss_factor(batch.data_step),
        reached=job.watch.pulse.reached,
    )


def rewound(job: Job, spike: Outcome, agreement: Agreement, interval: Meter) -> bool:
    """Rewinds if there is a checkpoint to return to; what was measured and not yet told of later steps is void."""
    later = agreement.settle()
    job.watch.pulse.at("rewind", job.progress.step)
    if not job.rewind(spike):
        job.records.message("there is no checkpoint to return to yet; going on")
        job.guard.judge(later)
        return False
    job.profiler.interrupt()
    interval.restart()
    job.records.rewound()
    return True


def due(step: int, every: int, last: int) -> bool:
    """Whether something done each `every` steps (0: never) and at the last one is due."""
    return step == last or (every > 0 and step % every == 0)


def validate(job: Job) -> dict[str, Scores]:
    """Scores of every validation set at the current step, recorded as `val_loss/<set>`."""
    pulse, scores = job.watch.pulse, {}
    for name, data in job.validation.items():
        pulse.at("evaluate", job.progress.step)
        scores[name] = evaluate(job.engine, job.ranks, data, job.config.evaluate.micro_batch_size, pulse.reached)
    if scores:
        job.progress.val_loss = {name: score.loss for name, score in scores.items()}
        values = {f"val_loss/{name}": score.loss for name, score in scores.items()}
        bits = {f"val_bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}
        values |= {name: value for name, value in bits.items() if value is not None}
        job.records.write({"step": job.progress.step, "tokens": job.progress.tokens, **values})
    return scores
