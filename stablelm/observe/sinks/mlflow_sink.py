"""MLflow: at MLFLOW_TRACKING_URI, or in files of the run directory where that is not set.

A new run of the experiment MLFLOW_EXPERIMENT_NAME, or `stablelm`; every attempt goes on with it, by the id that the run
directory keeps. The local store is of files, because mlflow-skinny has no database.
"""

import importlib
import os
import re
import time
from pathlib import Path
from shlex import quote
from typing import Any

from stablelm.config.schema import Config
from stablelm.observe.sinks.run_info import PROJECT, RunInfo, keep_run_id, run_id

NAME = "mlflow"
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_PARAM = 1000, 100, 6000
"""MLflow's own limits."""
CHECK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowSink:
    """`client`: an MlflowClient; `run`: the id of its run."""

    def __init__(self, client: Any, run: str):
        self._client, self._run = client, run

    def write(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_name(name), float(value), now, record["step"]) for name, value in record.items() if name != "step"
        ]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[first : first + METRICS_AT_ONCE])

    def rewound(self, step: int) -> None:
        """MLflow keeps what it has."""

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


def load(config: Config) -> None:
    """Imports the library, which takes seconds."""
    importlib.import_module(NAME)
    # MLflow refuses a store of files that is not asked for by name.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def problem(config: Config) -> str:
    """Why the server cannot be used, and what to do; '' if it can, or does not answer while a run goes on."""
    from mlflow.exceptions import MlflowException

    directory = Path(config.run.dir)
    uri = _uri(directory)
    if uri.startswith("file:"):
        return ""
    before = dict(os.environ)
    os.environ.update({name: os.environ.get(name, value) for name, value in CHECK.items()})
    try:
        _client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403):
            return (
                f"is not logged in at {uri}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN"
            )
        if run_id(directory, NAME) is None:
            return f"gets no answer from {uri}; start the server, or unset MLFLOW_TRACKING_URI to log into run.dir"
    finally:
        for name in CHECK.keys() - before.keys():
            del os.environ[name]
    return ""


def open_run(info: RunInfo) -> MlflowSink:
    """Begins the run or goes on with it. Raises MlflowException."""
    client = _client(_uri(info.directory))
    known = run_id(info.directory, NAME)
    if known is not None:
        client.update_run(known, status="RUNNING")
        return MlflowSink(client, known)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    found = client.get_experiment_by_name(experiment)
    own = client.create_run(
        found.experiment_id if found else client.create_experiment(experiment), run_name=info.name, tags=_tags(info)
    ).info.run_id
    keep_run_id(info.directory, NAME, own)
    _log_config(client, own, info)
    return MlflowSink(client, own)


def _log_config(client: Any, run: str, info: RunInfo) -> None:
    from mlflow.entities import Param

    params = [Param(_name(name), str(value)[:LONGEST_PARAM]) for name, value in info.config.items()]
    for first in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(run, params=params[first : first + PARAMS_AT_ONCE])


def _tags(info: RunInfo) -> dict[str, str]:
    method, depth = info.tags
    facts = {"method": method, "depth": depth, **info.provenance}
    if commit := info.provenance.get("commit"):
        facts["mlflow.source.git.commit"] = commit  # MLflow's own page shows it
    return {name: str(value)[:LONGEST_PARAM] for name, value in facts.items()}


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def _uri(directory: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or (directory.resolve() / NAME / "store").as_uri()


def _name(name: str) -> str:
    """With the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def where(run_dir: str) -> str:
    """A command or place that shows the curves."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {quote(f'{run_dir}/{NAME}/store')}"
