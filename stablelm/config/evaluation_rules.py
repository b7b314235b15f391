"""What cannot be right in the section `evaluate`, each problem with the keys it is about, and the names of metrics."""

import difflib
from collections.abc import Iterator

from stablelm.config import validation_sets
from stablelm.config.schema import Config

TASK_SUFFIX = ".jsonl"
ACCURACIES = ("acc", "acc_norm")


def higher_is_better(metric: str) -> bool:
    """Of accuracies; losses are to be low."""
    return metric.startswith("task/")


def metrics(config: Config) -> list[str]:
    """The metrics of an evaluation by which a checkpoint can be the best."""
    sets = list(validation_sets.sets(config.data))
    if not sets and config.data.path == "embedded" and not config.data.mixture:
        sets = ["default"]  # the embedded corpus brings its own
    losses = [f"val_loss/{name}" for name in sets]
    return losses + [f"task/{name}/{kind}" for name in config.evaluate.tasks for kind in ACCURACIES]


def problems(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(sentence, keys) for each mistake."""
    for name, path in config.evaluate.tasks.items():
        key = f"evaluate.tasks.{name}"
        if not validation_sets.NAME.fullmatch(name):
            yield f"{key}: the name of a task has only letters, digits, _ and -; rename it", (key,)
        elif not path.endswith(TASK_SUFFIX):
            yield f"{key}={path} is not a {TASK_SUFFIX} file; give a local file of query, choices and gold", (key,)
    best, known = config.evaluate.best, metrics(config)
    if best is not None and best not in known:
        near = difflib.get_close_matches(best, known, n=1, cutoff=0.3)
        fix = f"did you mean {near[0]}?" if near else "leave it out"
        if not known:
            fix = "give data.validation or evaluate.tasks, or leave it out"
        has = f"; it has {', '.join(known)}" if known else ""
        yield f"evaluate.best={best} is not a metric of this run{has}; {fix}", ("evaluate.best",)
