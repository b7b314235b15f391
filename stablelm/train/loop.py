"""The training loop: the file to read first."""

import time
from collections.abc import Callable
from functools import partial

from stablelm.checkpoint.best import best_step
from stablelm.data.loader import Batch
from stablelm.engine.interface import StepResult
from stablelm.observe.interval_metrics import IntervalMetrics
from stablelm.train.evaluation import validate
from stablelm.train.guards import recheck
from stablelm.train.job import Job
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step
from stablelm.train.stop import REASONS, Outcome, StepExchange


def train(job: Job) -> str:
    """Trains to the last step or an agreed stop; returns the reason of the stop, '' at the end."""
    config, progress, steps = job.config, job.progress, job.config.train.steps
    assert steps is not None
    interval = IntervalMetrics(
        job.engine.device, job.ranks, config, progress, job.records,
        lambda step: learning_rate(step, job.settings(step)), job.watchdog.hosts,
    )  # fmt: skip
    exchange = StepExchange(job.ranks)
    if progress.evaluation_due and not validate(job, exchange):
        return REASONS[exchange.known]
    while progress.step < steps:
        step = progress.step + 1
        batch, result = advance(job, interval, step)
        if due(step, config.observe.every, steps):
            interval.write(job.loader, job.own_metrics.take())
        job.layers.step(step, progress.tokens)
        if due(step, config.evaluate.every, steps):
            validate(job, exchange)
        request = job.stop.request(failed=job.saver.failed)
        agreed, outcomes = exchange.exchange(step, batch.data_step, result, request)
        reason = REASONS[agreed] or ("run.stop_after" if step == config.run.stop_after else "")
        best = best_step(progress.evaluations, config.evaluate.best) == step
        saving = due(step, config.checkpoint.every, steps) or best or bool(reason)
        if saving:  # only steps that the guard has checked
            interval.write(job.loader)
            outcomes += exchange.settle()
        spike = job.guard.judge(outcomes)
        stopping = bool(reason) and (step < steps or progress.evaluation_due)
        if spike is not None and not stopping and rewound(job, spike, exchange, interval):
            continue
        if saving:
            job.watchdog.marker.at("save", step)
            job.saver.wait()
            # When it stops at a spike, the resumed run meets the spike again and handles it.
            if spike is None or not stopping or progress.checkpointed_step < 0:
                job.save(stopping or step == steps)
        job.stop.save_seconds, job.stop.step_seconds = job.saver.margin_seconds, interval.slowest
        job.stop.layers_seconds = job.layers.slowest
        if stopping:
            exchange.settle()
            return reason
    return ""


def advance(job: Job, interval: IntervalMetrics, step: int) -> tuple[Batch, StepResult]:
    """Trains on the next batch and measures the step."""
    config, progress, marker = job.config, job.progress, job.watchdog.marker
    started = time.perf_counter()
    marker.at("data", step)
    job.faults.hang(step, "data")
    batch = job.loader.next()
    marker.at("step", step)
    job.faults.before(step)
    met = time.perf_counter()
    job.layers.before(step)
    take = update(job, batch, step)
    result = take(largest_norm=job.guard.largest_norm(step))
    if config.guards.recheck:
        recheck(step, result, take, job.ranks, job.watchdog.hosts, job.records.message)
    progress.step = step
    progress.tokens += config.train.batch_sizes.at(batch.data_step) * config.data.seq_len
    interval.add(result, wait=job.loader.wait_seconds, own=met - started, seconds=time.perf_counter() - started)
    marker.finished(step)
    job.profiler.step(step)
    job.collection.step(step)
    return batch, result


def update(job: Job, batch: Batch, step: int) -> Callable[..., StepResult]:
    """`train_step` of this batch, without its `largest_norm`."""
    config, settings = job.config, job.settings(step)
    job.engine.use(settings)
    return partial(
        train_step,
        job.engine,
        job.ranks,
        batch.tokens,
        batch.targets,
        step=step,
        lr=learning_rate(step, settings),
        seed=config.run.seed,
        micro=config.train.micro_batch_size or len(batch.tokens),
        loss_factor=job.faults.loss_factor(batch.data_step),
        mark=job.watchdog.marker.in_step,
        before_update=job.own_metrics.before_update(step, job.progress.tokens)
        if due(step, config.observe.every, config.train.steps or 0)
        else None,
    )


def rewound(job: Job, spike: Outcome, exchange: StepExchange, interval: IntervalMetrics) -> bool:
    """Rewinds if there is a checkpoint to return to; what was measured of later steps and not recorded is dropped."""
    later = exchange.settle()
    job.watchdog.marker.at("rewind", job.progress.step)
    if not job.rewind(spike):
        job.records.message("there is no checkpoint to return to yet; continuing")
        job.guard.judge(later)
        return False
    job.profiler.interrupt()
    interval.restart()
    job.records.rewound()
    return True


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last; `every` = 0 means only the last."""
    return step == last or (every > 0 and step % every == 0)
