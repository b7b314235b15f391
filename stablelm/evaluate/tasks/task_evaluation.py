"""Tasks of a checkpoint: multiple-choice files by our own reader, all other names by lm-evaluation-harness."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError, Problems, listed
from stablelm.evaluate.tasks.choice_items import SUFFIX, ChoiceTask, read_task
from stablelm.evaluate.tasks.choices import evaluate_choices
from stablelm.evaluate.tasks.likelihood import Shapes
from stablelm.evaluate.trained_run import TrainedRun

NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)
INSTALL = "pip install 'stablelm[eval]'"


@dataclass(frozen=True)
class TaskOptions:
    """As asked for: names or files, a folder of lm-eval's task definitions, items of each task, examples, rows."""

    tasks: list[str]
    folder: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class NamedTasks:
    """The files for our own reader by name, and what lm-evaluation-harness is to find."""

    files: dict[str, str]
    others: list[str]
    options: TaskOptions


@dataclass(frozen=True)
class TaskRequest:
    """Tasks that were found and read."""

    choices: dict[str, ChoiceTask]
    harness: list[Any] = field(default_factory=list)
    limit: int | None = None
    few_shot: int | None = None
    batch_size: int | None = None


def named_tasks(options: TaskOptions) -> NamedTasks:
    """The tasks by who scores them. Raises ConfigError for arguments that make no sense, before anything is opened."""
    files: dict[str, str] = {}
    others: list[str] = []
    for task in (part.strip() for asked in options.tasks for part in asked.split(",")):
        named = NAMED.fullmatch(task)
        path = named[2] if named else task
        if not task:
            raise ConfigError("--tasks has an empty name; give names and files, separated by commas")
        if named and not path.endswith(SUFFIX):
            raise ConfigError(f"--tasks {task}: {path} is not a {SUFFIX} file; give NAME=FILE{SUFFIX}")
        name = named[1] if named else Path(path).stem if path.endswith(SUFFIX) else task
        if name in files or name in others:
            raise ConfigError(f"--tasks names {name} twice; give another name by NAME=FILE{SUFFIX}")
        if path.endswith(SUFFIX):
            files[name] = path
        else:
            others.append(task)
    _check_numbers(options)
    if options.few_shot is not None and files:
        raise ConfigError(
            f"--few-shot {options.few_shot} is for tasks of lm-evaluation-harness; {SUFFIX} files have their whole "
            f"prompt in the query: leave it out for {listed(list(files), show=str)}"
        )
    if options.folder is not None and not Path(options.folder).is_dir():
        raise ConfigError(f"--task-path {options.folder} is not a directory; name the one with the tasks' yaml files")
    if others and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks {','.join(others)} needs lm-evaluation-harness: {INSTALL}, or give a {SUFFIX} file")
    return NamedTasks(files, others, options)


def _check_numbers(options: TaskOptions) -> None:
    for name, value, least in (
        ("--limit", options.limit, 1),
        ("--few-shot", options.few_shot, 0),
        ("--batch-size", options.batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")


def find_tasks(named: NamedTasks, run: TrainedRun) -> TaskRequest:
    """Reads every file and finds every name. Raises ConfigError with a line for each problem."""
    longest, options = run.config.model.max_seq_len, named.options
    assert longest is not None
    problems, choices, found = Problems(), {}, []
    for name, path in named.files.items():
        with problems.collecting():
            choices[name] = read_task(path, run.tokenizer, longest=longest, items=options.limit, key=f"--tasks {name}")
    if named.others:
        from stablelm.evaluate.tasks.harness import load_tasks

        with problems.collecting():
            found = load_tasks(named.others, options.folder)
    problems.raise_any()
    return TaskRequest(choices, found, options.limit, options.few_shot, options.batch_size)


def score_tasks(
    request: TaskRequest, run: TrainedRun, engine: Engine, ranks: Ranks, show: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of each task by name, on rank 0, where `show` gets a line for each. Collective."""
    figures: dict[str, Any] = {}
    for name, task in request.choices.items():
        scores = evaluate_choices(engine, ranks, task, Shapes.of(run.config, request.batch_size))
        figures[name] = scores.as_dict()
        if ranks.is_first:
            show(in_words(name, figures[name]))
            if task.shortened:
                show(
                    f"{name}: {task.shortened} choices with their query do not fit into the model's "
                    f"{run.config.model.max_seq_len} tokens; of these it sees the end"
                )
    if request.harness:
        from stablelm.evaluate.tasks.harness import StableLM, run_tasks

        model = StableLM(run, engine, ranks, request.batch_size)
        others = run_tasks(model, request.harness, limit=request.limit, few_shot=request.few_shot)
        figures |= others
        for name in others if ranks.is_first else ():
            show(in_words(name, others[name]))
    return figures


def in_words(name: str, figures: dict[str, Any]) -> str:
    """One line for a reader: each metric with its standard error, and the number of items."""
    parts = []
    for metric, value in figures.items():
        if metric == "n" or metric.endswith("stderr"):
            continue
        error = figures.get("stderr" if metric == "acc" else f"{metric}_stderr")
        parts.append(f"{metric} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    return "  ".join([f"{name}:", *parts, f"n {figures['n']}"])
