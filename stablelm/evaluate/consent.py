"""Which text a checkpoint may have read to be evaluated on, and what of it needs the user's word."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelm.checkpoint import saved_run, selection
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.config import data_rules
from stablelm.config.keys import choices, find
from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.config.trust import Believed
from stablelm.errors import ConfigError
from stablelm.methods import catalogue

_SECTIONS = ("run.", "train.", "engine.", "observe.", "checkpoint.", "guards.", "faults.")
UNUSED = (*_SECTIONS, "data.path", "data.mixture", "evaluate.tasks", "evaluate.best", "evaluate.samples")
"""What an evaluation does nothing with."""
NOTHING_ALONE = ("data.cache", "data.storage.", "data.dataset.", "data.tokenizer")
"""What does nothing where all text is local and no data set, and the tokenizer, which a run keeps beside itself."""
SHOWN = 100


def own_configuration(files: list[str]) -> Loaded | None:
    """The user's own configuration of `--config`, None without one. Raises ConfigError."""
    from stablelm.config.load import load

    if not files:
        return None
    own = load(files, [])
    catalogue.find(own.config.model.method)  # imports it, if it is named by import path
    if problems := [f"{problem} (--config)" for problem, _ in data_rules.problems(own.config.data)]:
        raise ConfigError("\n".join(problems))
    return own


def elsewhere(checkpoint: str, own: Loaded | None, trusted: bool) -> CheckpointPath | None:
    """Where a run's checkpoints lie outside its directory, by the user's word; None: nowhere else."""
    asked = own.config.checkpoint.dir if own is not None else None
    if asked is None and trusted:
        asked = selection.configured_root(selection.run_directory(checkpoint_path(checkpoint)))
    return checkpoint_path(asked) if asked else None


def configuration_for(
    checkpoint: CheckpointPath, *, has_data: bool, own: Loaded | None, trusted: bool, first_rank: bool
) -> Config:
    """The configuration to evaluate a checkpoint with; `has_data`: the user names the text.

    `data.tokenizer` is empty where the checkpoint names one that is not to be opened.
    Raises ConfigError, before any of it is opened, where the checkpoint's own validation text needs more than reading
    plain files of this machine.
    """
    found = saved_run.read_configuration(checkpoint, own=own, trusted=trusted)
    asked = {name: value for name, value in found.withheld.items() if _reaches(name, value)}
    if trusted:
        _say(asked, "the checkpoint's configuration is trusted, with", first_rank)
    elif has_data:
        _say(asked, "not used, as a checkpoint may come from anybody (--config or --trust-checkpoint):", first_rank)
    elif needed := {name: value for name, value in asked.items() if not name.startswith(NOTHING_ALONE)}:
        raise ConfigError(
            f"the configuration of {checkpoint} asks for {_listed(needed)}; a checkpoint may come from anybody, so "
            "this is not done unasked: name text by --data, or give your own configuration by --config"
            f"{_hint(checkpoint)}, or --trust-checkpoint"
        )
    elif not _sets(found):
        raise ConfigError("the run has no validation set; name text to evaluate on by --data PATH")
    if "data.tokenizer" in asked and not trusted:
        return replace(found.config, data=replace(found.config.data, tokenizer=""))
    return found.config


def needs_consent(found: Believed) -> bool:
    """Whether a run's configuration asks for more than is done for any checkpoint."""
    asked = (name for name, value in found.withheld.items() if _reaches(name, value))
    return any(not name.startswith(NOTHING_ALONE) for name in asked)


def _reaches(name: str, value: Any) -> bool:
    """Whether a withheld key can name something outside: text that is no choice of ours, or data sets."""
    if name.startswith(UNUSED):
        return False
    key, _ = find(name)
    if key is not None and choices(key.name):
        return (name, value) == ("data.source", "datasets")
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(item, str) for item in value))


def _sets(found: Believed) -> bool:
    """Whether there is text to evaluate on: a set, or the embedded corpus's own."""
    data = found.config.data
    elsewhere = any(name.startswith(("data.path", "data.mixture")) for name in found.withheld)
    return bool(data.validation) or data.validation_path is not None or not elsewhere


def _say(asked: Mapping[str, Any], words: str, first_rank: bool) -> None:
    if asked and first_rank:
        print(f"{words} {_listed(asked)}", file=sys.stderr, flush=True)


def _listed(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in asked.items())


def _short(value: Any) -> str:
    words = repr(value) if isinstance(value, list | tuple) or not str(value).isprintable() else str(value)
    return words if len(words) <= SHOWN else words[: SHOWN - 3] + "..."


def _hint(checkpoint: CheckpointPath) -> str:
    kept = checkpoint.parent.parent / "config.yaml" if isinstance(checkpoint, Path) else None
    return f" ({kept}, if the run is yours)" if kept is not None and kept.is_file() else ""
