"""Multiple choice by likelihood: the right choice is the likeliest continuation of the query."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.tasks.choice_items import ChoiceTask
from stablelm.evaluate.tasks.likelihood import Shapes, loglikelihoods


@dataclass(frozen=True)
class TaskScores:
    """Shares of the `n` items whose right choice is the likeliest, and the likeliest a character (`acc_norm`).

    The figures and their standard errors are those of lm-evaluation-harness; of a single item there is no error.
    """

    acc: float
    acc_norm: float
    stderr: float | None
    acc_norm_stderr: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "acc": self.acc,
            "acc_norm": self.acc_norm,
            "stderr": self.stderr,
            "acc_norm_stderr": self.acc_norm_stderr,
            "n": self.n,
        }


def evaluate_choices(
    engine: Engine,
    ranks: Ranks,
    task: ChoiceTask,
    shapes: Shapes,
    reached: Callable[[str], None] = lambda place: None,
) -> TaskScores:
    """The same on every rank, in every world size; see `likelihood.loglikelihoods`. Collective."""
    scores = iter(loglikelihoods(engine, ranks, [one for item in task.requests for one in item], shapes, reached))
    right, right_norm = [], []
    for requests, lengths, gold in zip(task.requests, task.lengths, task.gold, strict=True):
        found = np.array([next(scores).log_probability for _ in requests])
        right.append(float(np.argmax(found) == gold))
        right_norm.append(float(np.argmax(found / np.array(lengths, np.float64)) == gold))
    (acc, stderr), (acc_norm, norm_stderr) = _mean(right), _mean(right_norm)
    return TaskScores(acc, acc_norm, stderr, norm_stderr, len(right))


def _mean(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, s / sqrt(n) with s the sample standard deviation."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1)) / math.sqrt(n)
