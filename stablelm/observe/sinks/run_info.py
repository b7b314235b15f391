"""What a logger is given of a run beside its records, without credentials."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stablelm.config.keys import values
from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.errors import ConfigError
from stablelm.new_files import make_folder, replace_file
from stablelm.observe import provenance
from stablelm.observe.progress import Progress
from stablelm.observe.sinks.metrics_file import METRICS, read_metrics, what_counts
from stablelm.redaction import HIDDEN, is_secret, redacted
from stablelm.small_files import read_small

PROJECT = "stablelm"
"""The project, or experiment, of runs whose environment names none."""
RUN_ID = "run-id"
PROVENANCE = ("commit", "world_size", "python", "system", "slurm_job")


class Sink(Protocol):
    """What takes records, or (see `once`) their numbers; each of them may raise anything."""

    def write(self, record: dict[str, Any]) -> None: ...

    def rewound(self, step: int) -> None:
        """The run is at `step` again."""

    def close(self, failed: bool) -> None:
        """The attempt ends; `failed`: not by finishing or an agreed stop."""


@dataclass(frozen=True)
class RunInfo:
    """The attempt begins at `step`; `recorded` are all records of earlier ones."""

    directory: Path
    name: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """By dotted name, numbers, strings and lists of them."""
    config_text: str
    provenance: Mapping[str, Any]
    """Commit, command, versions and machine of this attempt, as numbers and strings."""
    attempt: int
    step: int
    recorded: Sequence[dict[str, Any]]

    def history(self) -> Iterator[dict[str, Any]]:
        """What counts of each finished step, in order."""
        return (record for step, record in what_counts(self.recorded).items() if step <= self.step)


def run_info(config: Config, progress: Progress) -> RunInfo:
    """Of the attempt that begins at `progress.step`; its provenance is on record already."""
    directory = Path(config.run.dir)
    attempts = provenance.read(directory)
    model = config.model
    return RunInfo(
        directory=directory,
        name=directory.resolve().name,
        tags=(model.method, f"{model.n_layers} layers"),
        config={name: _public(name, value) for name, value in values(config).items()},
        config_text=redacted(dump(config)),
        provenance=_where_from(attempts[-1]) if attempts else {},
        attempt=progress.attempt,
        step=progress.step,
        recorded=recorded(directory),
    )


def _where_from(attempt: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: attempt.get(name) for name in PROVENANCE}
    versions = ", ".join(f"{package} {version}" for package, version in attempt.get("versions", {}).items())
    return {name: value for name, value in facts.items() if value is not None} | {
        "command": redacted(shlex.join(attempt.get("argv", []))),
        "versions": versions,
    }


def recorded(directory: Path) -> list[dict[str, Any]]:
    """The records of a run so far; none where they are damaged, since a logger is no reason not to train."""
    try:
        return read_metrics(directory / METRICS)
    except (OSError, ConfigError):
        return []


def run_id(directory: Path, logger: str) -> str | None:
    """The id under which a logger knows the run, None before its first attempt; not believed if it has odd letters."""
    try:
        content = read_small(directory / logger / RUN_ID, most=1 << 10).decode()
    except (OSError, ValueError):
        return None
    return content.strip() if re.fullmatch(r"[\w-]{1,128}", content.strip()) else None


def keep_run_id(directory: Path, logger: str, name: str) -> None:
    """Keeps the id for later attempts. Raises OSError."""
    replace_file(make_folder(directory / logger) / RUN_ID, f"{name}\n")


def _public(name: str, value: Any) -> Any:
    """A value without credentials, which a configuration may have under names of the user's choice."""
    if isinstance(value, Mapping):
        return {key: _public(f"{name}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(name, inner) for inner in value]
    shown = redacted(value) if isinstance(value, str) else value
    return HIDDEN if is_secret(name, shown) else shown
