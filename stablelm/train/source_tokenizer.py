"""Whether the tokens of a new run mean what they meant to the weights that it begins from (torch-free)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelm.checkpoint import saved_run, selection
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.config.schema import Config
from stablelm.data.corpus import configured_tokenizer
from stablelm.errors import CheckpointError, ConfigError
from stablelm.printable import printable
from stablelm.tokenizers import Tokenizer, load_tokenizer
from stablelm.tokenizers.location import kept_tokenizer


def check_tokenizer(key: str, source: str, config: Config, tokenizer: Tokenizer) -> None:
    """ConfigError if a piece of the tokenizer of the run `source`, which `key` names, has another id, or none, in this
    one.

    More pieces, and other tokens around a document, are allowed. A checkpoint that cannot be read is reported later,
    where it is verified.
    """
    found = _newest(checkpoint_path(source))
    if found is None:
        return
    try:
        identity = saved_run.read_state(found)["identity"]
    except CheckpointError:
        return
    sha256 = identity.get("data.tokenizer")
    if sha256 is None or _same_file(identity, config, tokenizer, sha256):
        return
    path = kept_tokenizer(found.parent.parent) if isinstance(found, Path) else None
    if path is None:
        name, why, given = f"with SHA-256 {printable(sha256[:12])}...", "", "it"
    else:
        why = _difference(load_tokenizer(path, key=key), tokenizer)
        if why is None:
            return
        name, given = printable(path), printable(path)
    raise ConfigError(
        f"{key}={source} was trained with another tokenizer ({name}) than "
        f"data.tokenizer={config.data.tokenizer}{why}; give {given} by data.tokenizer"
    )


def _newest(path: CheckpointPath) -> CheckpointPath | None:
    try:
        step = selection.step_directory(path)
        root = selection.checkpoints_root(selection.run_directory(path))
    except CheckpointError:
        return None
    return step or next(iter(selection.step_directories(root)), None)


def _same_file(identity: dict[str, Any], config: Config, tokenizer: Tokenizer, sha256: str) -> bool:
    """Whether the tokenizer is the same but for the tokens around a document."""
    if tokenizer.sha256 == sha256:
        return True
    around = {
        name: identity.get(f"data.{name}", default) for name, default in (("add_bos", False), ("eos_token", None))
    }
    try:
        return configured_tokenizer(replace(config.data, **around)).sha256 == sha256
    except ConfigError:  # it lacks these tokens
        return False


def _difference(source: Tokenizer, tokenizer: Tokenizer) -> str | None:
    here = tokenizer.vocabulary()
    for piece, number in sorted(source.vocabulary().items(), key=lambda item: item[1]):
        if here.get(piece) != number:
            found = "is none" if piece not in here else f"has id {here[piece]}"
            return f": {printable(repr(piece))}, id {number} there, {found} here"
    return None
