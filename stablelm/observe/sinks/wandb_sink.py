"""Weights & Biases: records as history over the metric `step`; online, or into the run directory by WANDB_MODE=offline.

The run is the same one in every attempt, by an id that the run directory keeps. W&B numbers the rows of a history and
takes no number again, so rows are numbered by the records of metrics.jsonl, and charts have `step` as their axis.
"""

import importlib
import os
import uuid
from shlex import quote
from typing import Any

from stablelm.config.schema import Config
from stablelm.observe.sinks.run_info import PROJECT, RunInfo, keep_run_id, run_id

NAME = "wandb"
OFFLINE = ("offline", "dryrun", "disabled")


class WandbSink:
    """`run`: an open W&B run; `row`: the number of its next row."""

    def __init__(self, run: Any, row: int):
        self._run, self._row = run, row
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=self._row)
        self._row += 1

    def rewound(self, step: int) -> None:
        """W&B keeps what it has."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def load(config: Config) -> None:
    """Imports the library, which takes seconds."""
    importlib.import_module(NAME)


def problem(config: Config) -> str:
    """Why the library cannot be used, and what to do; '' if it can."""
    import wandb

    if wandb.setup().settings.mode in OFFLINE or wandb.login(prompt=False, verify=False):
        return ""
    return "is not logged in; run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline to log into run.dir"


def open_run(info: RunInfo) -> WandbSink:
    """Begins the run or goes on with it. Raises wandb.Error."""
    known = run_id(info.directory, NAME)
    own = known or uuid.uuid4().hex[:12]
    if known is None:
        keep_run_id(info.directory, NAME, own)
    return WandbSink(_init(info, own), len(info.recorded) if known else 0)


def _init(info: RunInfo, own: str) -> Any:
    import wandb

    # What wandb would find out itself (arguments, changes of the code, console) may hold credentials.
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True)
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        dir=str(info.directory),
        id=own,
        resume="allow",
        name=info.name,
        tags=info.tags,
        config={**info.config, "provenance": {"attempt": info.attempt, **info.provenance}},
        settings=settings,
    )


def where(run_dir: str) -> str:
    """A command or place that shows the curves."""
    if os.environ.get("WANDB_MODE") in OFFLINE:
        return f"wandb sync {quote(run_dir)}/wandb/offline-run-*"
    return f"project {os.environ.get('WANDB_PROJECT') or PROJECT} on W&B"
