"""The best checkpoint of a run by a metric of its evaluations.

There is no file that names it: the state of each checkpoint says what the evaluation of its own step gave, and that of
the best one before it. So a save that is cut off, an archived folder or a store without links lose nothing.
"""

from collections.abc import Iterable, Mapping

from stablelm.checkpoint import saved_run
from stablelm.checkpoint.manifest import step_of
from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.config.evaluation_rules import higher_is_better
from stablelm.errors import CheckpointError, ConfigError

BEST = "best"
"""Name under which the best checkpoint of a run is asked for, as RUN_DIR/best."""
Evaluations = Mapping[int, Mapping[str, float]]
"""Metrics by step."""


def best_step(evaluations: Evaluations, metric: str | None) -> int | None:
    """The step with the best value, the earliest of equal ones; None without the metric."""
    if metric is None:
        return None
    sign = 1 if higher_is_better(metric) else -1
    with_metric = [step for step in sorted(evaluations) if metric in evaluations[step]]
    return max(with_metric, key=lambda step: sign * evaluations[step][metric], default=None)


def evaluations_of(paths: Iterable[CheckpointPath]) -> dict[int, dict[str, float]]:
    """What checkpoints know of their own evaluations and the best before; of each step as the newest one has it."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(paths, key=lambda path: step_of(path) or 0):
        try:
            state = saved_run.read_state(path)
        except StoreError:
            raise
        except CheckpointError:  # damaged
            continue
        found |= from_state(state)
    return found


def from_state(state: Mapping) -> dict[int, dict[str, float]]:
    """The evaluations of a state."""
    return {int(step): dict(metrics) for step, metrics in state.get("evaluations", {}).items()}


def to_state(evaluations: Evaluations, step: int, metric: str | None) -> dict[str, dict[str, float]]:
    """What the state of `step` is to know: its own evaluation, if it was made, and the best so far."""
    return {str(known): dict(evaluations[known]) for known in {step, best_step(evaluations, metric)} & set(evaluations)}


def ranked(paths: list[CheckpointPath], metric: str) -> list[CheckpointPath]:
    """Those of evaluated steps, the best first."""
    evaluations, by_step = evaluations_of(paths), {step_of(path): path for path in reversed(paths)}
    evaluations = {step: metrics for step, metrics in evaluations.items() if step in by_step}
    found = []
    while (step := best_step(evaluations, metric)) is not None:
        found.append(by_step[step])
        del evaluations[step]
    return found


def metric_of(path: CheckpointPath) -> str | None:
    """`evaluate.best` of a checkpoint's configuration; None where it has none or cannot be read."""
    try:
        return saved_run.saved(path).evaluate.best
    except StoreError:
        raise
    except (CheckpointError, ConfigError):
        return None
