"""Evaluates a committed checkpoint in any world size, in the run's own precision and compile mode."""

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from stablelm.config.load import Loaded
from stablelm.engine.launch_environment import Launch, accelerate_flags, detect, engine_kind
from stablelm.errors import ConfigError, UserError
from stablelm.evaluate import consent
from stablelm.evaluate.set_evaluation import SetRequest, find_sets, score_sets
from stablelm.evaluate.tasks.task_evaluation import TaskOptions, TaskRequest, find_tasks, named_tasks, score_tasks
from stablelm.evaluate.trained_run import TrainedRun, open_run
from stablelm.out_file import check_out, write_out
from stablelm.process_exit import OTHERS_WAIT_SECONDS, end_at_once, report

if TYPE_CHECKING:
    from stablelm.engine.ranks import Ranks


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, all of it checked."""

    run: TrainedRun
    kind: str
    sets: SetRequest | None
    tasks: TaskRequest | None


def evaluate_checkpoint(
    checkpoint: str,
    *,
    data: list[str],
    tokenizer: str | None,
    sequences: int | None,
    out: str | None,
    reading: Mapping[str, str] | None = None,
    config: list[str] | None = None,
    trusted: bool = False,
    tasks: TaskOptions | None = None,
    average: str | None = None,
) -> int:
    """Prints the figures of each set and task and writes them to `out`; returns the exit code.

    `reading`: fields of `ReadOptions` that differ from the run's. `config`: files of the user's own configuration;
    `trusted`: the checkpoint's is used like it. `average`: which weights, in place of the run's. With `tasks` and
    without `data` no set is scored.
    """
    launch = Launch()
    try:
        launch = detect()
        check_out(out)
        own = consent.own_configuration(config or [])
        request = prepare(checkpoint, data, tokenizer, sequences, reading or {}, launch, own, trusted, tasks, average)
    except UserError as error:
        report(error, launch.rank)
        return ConfigError.exit_code
    try:
        return _run(request, launch, out)
    except Exception as error:
        if isinstance(error, UserError):
            report(error, launch.rank)
        else:
            time.sleep(OTHERS_WAIT_SECONDS if launch.rank else 0)
            traceback.print_exc()
        code = error.exit_code if isinstance(error, UserError) else 1
        if launch.world_size > 1:
            end_at_once(code)
        return code


def prepare(
    checkpoint: str,
    data: list[str],
    tokenizer: str | None,
    sequences: int | None,
    reading: Mapping[str, str],
    launch: Launch,
    own: Loaded | None,
    trusted: bool,
    tasks: TaskOptions | None,
    average: str | None = None,
) -> EvaluationRequest:
    """Opens and checks all that is asked for, as of `evaluate_checkpoint`. Raises CheckpointError and ConfigError."""
    named = named_tasks(tasks) if tasks is not None else None
    run = open_run(
        checkpoint,
        tokenizer=tokenizer,
        has_data=bool(data) or named is not None,
        own=own,
        trusted=trusted,
        first_rank=launch.rank == 0,
        average=average,
    )
    return EvaluationRequest(
        run=run,
        kind=engine_kind("auto", accelerate_flags(), launch.world_size),
        sets=find_sets(data, sequences, run.config, reading, run.tokenizer) if data or named is None else None,
        tasks=find_tasks(named, run) if named is not None else None,
    )


def figures(request: EvaluationRequest, launch: Launch, show: Callable[[str], None]) -> "tuple[dict[str, Any], Ranks]":
    """What `--out` holds, complete on rank 0, where `show` gets a line for each set and task; and the ranks, connected.

    Collective.
    """
    from stablelm.evaluate.run_engine import load_engine

    engine, ranks, run = load_engine(request.run, launch, request.kind)
    sets = score_sets(request.sets, run, engine, ranks, show) if request.sets is not None else {}
    tasks = score_tasks(request.tasks, run, engine, ranks, show) if request.tasks is not None else {}
    return {"checkpoint": str(run.checkpoint), "step": run.step, "sets": sets, "tasks": tasks}, ranks


def _run(request: EvaluationRequest, launch: Launch, out: str | None) -> int:
    from stablelm.engine.ranks import disconnect

    found, ranks = figures(request, launch, partial(print, flush=True))
    if ranks.is_first and out is not None:
        write_out(out, json.dumps(found, indent=2) + "\n")
    disconnect(ranks)
    return 0
