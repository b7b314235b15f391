"""Trackio: in a folder of the run directory, or where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say.

Every attempt goes on with the run of the name that the run directory keeps, in the project TRACKIO_PROJECT or
`stablelm`. Where others log too, the name gets letters of its own: Trackio knows runs by name.
"""

import importlib
import os
import uuid
from pathlib import Path
from shlex import quote
from typing import Any

from stablelm.config.schema import Config
from stablelm.observe.sinks.run_info import PROJECT, RunInfo, keep_run_id, run_id

NAME = "trackio"
FOLDER = "TRACKIO_DIR"
ELSEWHERE = (FOLDER, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioSink:
    """`run`: an open Trackio run."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def rewound(self, step: int) -> None:
        """Trackio keeps what it has."""

    def close(self, failed: bool) -> None:
        self._run.finish()


def load(config: Config) -> None:
    """Imports the library, which reads its folder from the environment meanwhile."""
    if not any(map(os.environ.get, ELSEWHERE)):
        os.environ[FOLDER] = _own_folder(config.run.dir)
    importlib.import_module(NAME)


def problem(config: Config) -> str:
    """Why the library cannot be used, and what to do; '' if it can."""
    space = os.environ.get("TRACKIO_SPACE_ID")
    if not space:
        return ""
    from huggingface_hub import get_token

    if get_token():
        return ""
    return f"is not logged in for TRACKIO_SPACE_ID={space}; run hf auth login, or set HF_TOKEN"


def open_run(info: RunInfo) -> TrackioSink:
    """Begins the run or goes on with it."""
    import trackio

    known = run_id(info.directory, NAME)
    alone = os.environ.get(FOLDER) == _own_folder(info.directory)
    own = known or (info.name if alone else f"{info.name}-{uuid.uuid4().hex[:6]}")
    facts = {"tags": list(info.tags), "provenance": {"attempt": info.attempt, **info.provenance}}
    run = trackio.init(_project(), name=own, resume="allow", config={**info.config, **facts}, embed=False)
    if known is None:
        keep_run_id(info.directory, NAME, own)
    return TrackioSink(run)


def _own_folder(run_dir: str | Path) -> str:
    return str(Path(run_dir).resolve() / NAME)


def _project() -> str:
    return os.environ.get("TRACKIO_PROJECT") or PROJECT


def where(run_dir: str) -> str:
    """A command that shows the curves."""
    show, own = f"trackio show --project {quote(_project())}", _own_folder(run_dir)
    return show if any(os.environ.get(name, own) != own for name in ELSEWHERE) else f"{FOLDER}={quote(own)} {show}"
