"""Evaluation within a run, which a stop may cut short between two batches, and the comparison at its end."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stablelm.checkpoint.best import best_step
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.config import mixture
from stablelm.data import validation
from stablelm.data.mixture import Mixture
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError
from stablelm.evaluate.perplexity import Scores, bits_per_byte, evaluate, in_words
from stablelm.evaluate.tasks.choices import TaskScores, evaluate_choices
from stablelm.evaluate.tasks.likelihood import Shapes
from stablelm.observe.sinks import SAMPLES
from stablelm.printable import printable
from stablelm.train.averaging import checkpoints_before, evaluated_weights
from stablelm.train.job import Job
from stablelm.train.prepare import Prepared
from stablelm.train.stop import StepExchange

UNIGRAM_TOKENS = 2_000_000


class _CutShort(Exception):
    """All ranks have agreed to stop."""


def validate(job: Job, exchange: StepExchange) -> bool:
    """Scores every validation set and task at the current step, and writes samples, at the end to the terminal too.

    All of them with the weights of `evaluate.average`. Recorded as `val_loss/<set>`,
    `val_loss_by_frequency/<set>/<third>`, `task/<name>/acc` and `samples`. False if a stop cuts that short: nothing is
    recorded, and the evaluation stays due.
    """
    progress, rows, reached = job.progress, job.config.evaluate.micro_batch_size, partial(_reached, job, exchange)
    scores: dict[str, Scores] = {}
    choices: dict[str, TaskScores] = {}
    progress.evaluation_due = True
    try:
        with evaluated_weights(job.engine, job.ranks, job.config, partial(_earlier, job)):
            samples = _score(job, rows, reached, scores, choices)
    except _CutShort:
        return False
    progress.evaluation_due = False
    if scores or choices:
        progress.val_loss = {name: score.loss for name, score in scores.items()}
        values = {f"val_loss/{name}": score.loss for name, score in scores.items()}
        for name, score in choices.items():
            values |= {f"task/{name}/acc": score.acc, f"task/{name}/acc_norm": score.acc_norm}
        _remember(job, values)
        bits = {f"val_bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}
        values |= {name: value for name, value in bits.items() if value is not None}
        for name, score in scores.items():
            values |= {f"val_loss_by_frequency/{name}/{third}": loss for third, loss in score.by_frequency.items()}
        job.records.write({"step": progress.step, "tokens": progress.tokens, **values})
    if samples:
        job.records.write({"step": progress.step, "tokens": progress.tokens, SAMPLES: samples})
        for sample in samples if progress.step == job.config.train.steps else ():
            job.records.message(f"sample:   {printable(' '.join((sample['prompt'] + sample['text']).split()))}")
    job.page.refresh()
    return True


def _score(
    job: Job,
    rows: int,
    reached: Callable[[str], None],
    scores: dict[str, Scores],
    choices: dict[str, TaskScores],
) -> list[dict[str, str]]:
    """Fills scores by set and task; returns samples. Raises _CutShort."""
    marker, step = job.watchdog.marker, job.progress.step
    for name, data in job.validation.items():
        marker.at("evaluation", step)
        scores[name] = evaluate(job.engine, job.ranks, data, rows, reached)
    for name, task in job.tasks.items():
        marker.at("evaluation", step)
        choices[name] = evaluate_choices(job.engine, job.ranks, task, Shapes.of(job.config), reached)
    marker.at("evaluation", step)
    return job.samples.write(job.engine, job.ranks, reached)


def _earlier(job: Job) -> list[CheckpointPath]:
    """The run's checkpoints before the current step, the same on all ranks."""
    job.saver.wait()
    step = job.progress.step
    return job.ranks.consensus().first(lambda: checkpoints_before(job.saver.fence.root, step))


def _remember(job: Job, metrics: dict[str, float]) -> None:
    """Keeps what decides which checkpoint is the best: this evaluation and the best before."""
    known, step = job.progress.evaluations, job.progress.step
    earlier = best_step(known, job.config.evaluate.best)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    job.progress.evaluations = ({} if earlier is None else {earlier: known[earlier]}) | {step: finite}


def _reached(job: Job, exchange: StepExchange, place: str) -> None:
    """Before each micro-batch and each token of a sample, on all ranks alike."""
    marker, stop = job.watchdog.marker, job.stop
    stop.batch_seconds = max(stop.batch_seconds, time.time() - marker.now.since)
    marker.reached(place)
    if exchange.ask(stop.request(failed=job.saver.failed)):
        raise _CutShort


def compare_with_unigram(prepared: Prepared, job: Job, message: Callable[[str], None]) -> dict[str, Any]:
    """Prints each validation set's final loss, bits per byte and unigram cross-entropy (nats); returns them."""
    config, corpora = job.config, prepared.corpora
    assert corpora is not None and config.train.steps is not None
    mixed = Mixture.of(mixture.sources(config.data), seed=config.run.seed) if config.data.mixture else None
    found: dict[str, Any] = {"unigram_loss": {}, "val_bits_per_byte": {}}
    for name, data in job.validation.items():
        loss = job.progress.val_loss[name]
        found["val_bits_per_byte"][name] = bits = bits_per_byte(loss, data.bytes_per_token)
        try:
            baseline = validation.unigram_cross_entropy(
                corpora.train,
                prepared.tokenizer,
                data,
                vocab=prepared.tokenizer.pieces,
                tokens=UNIGRAM_TOKENS,
                options=ReadOptions.of(config.data),
                shares=mixed.shares(config.train.steps) if mixed else None,
            )
        except DataError as error:
            # The run is complete and saved: a baseline that cannot be read must not fail it.
            message(f"validation {name}: loss {loss:.4f}, {in_words(bits)} (no unigram baseline: {error})")
            continue
        found["unigram_loss"][name] = baseline
        side = "below" if loss <= baseline else "above"
        message(
            f"validation {name}: loss {loss:.4f}, {in_words(bits)}; {abs(baseline - loss):.4f} nats {side} the unigram "
            f"baseline ({baseline:.4f})"
        )
    return found
