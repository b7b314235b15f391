"""Evaluation within a run, which a stop may cut short between two of its batches."""

import time
from functools import partial

from stablelm.evaluate.perplexity import evaluate
from stablelm.train.job import Job
from stablelm.train.stop import StepExchange


class _CutShort(Exception):
    """All ranks have agreed to stop."""


def validate(job: Job, agreement: StepExchange) -> bool:
    """Scores every validation set at the current step and records them as `val_loss/<set>`.

    False if a stop cut that short: nothing is recorded then, and the evaluation stays due.
    """
    progress, rows, scores = job.progress, job.config.evaluate.micro_batch_size, {}
    progress.evaluation_due = True
    try:
        for name, data in job.validation.items():
            job.watch.pulse.at("evaluate", progress.step)
            scores[name] = evaluate(job.engine, job.ranks, data, rows, partial(_reached, job, agreement))
    except _CutShort:
        return False
    progress.evaluation_due = False
    if scores:
        progress.val_loss = {name: score.loss for name, score in scores.items()}
        values = {f"val_loss/{name}": score.loss for name, score in scores.items()}
        bits = {f"val_bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}
        values |= {name: value for name, value in bits.items() if value is not None}
        job.records.write({"step": progress.step, "tokens": progress.tokens, **values})
    return True


def _reached(job: Job, agreement: StepExchange, place: str) -> None:
    """Before each micro-batch, on all ranks alike."""
    pulse, stop = job.watch.pulse, job.stop
    stop.batch_seconds = max(stop.batch_seconds, time.time() - pulse.now.since)
    pulse.reached(place)
    if agreement.ask(stop.wish(failed=job.saver.failed)):
        raise _CutShort
