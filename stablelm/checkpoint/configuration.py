"""The configuration of a checkpoint for programs that use one: the one place at which it is read.

A checkpoint may come from anybody. What is taken of it without a word from the user is said in `config.trust`.
"""

from typing import Any

from stablelm.checkpoint import selection
from stablelm.checkpoint.manifest import CONFIG
from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.config import rules
from stablelm.config.load import Loaded
from stablelm.config.saved import in_effect
from stablelm.config.schema import Config, ModelConfig
from stablelm.config.trust import Believed, believed, excesses
from stablelm.errors import CheckpointError, ConfigError
from stablelm.small_files import read_small

CONFIG_BYTES = 4 << 20


def read(path: CheckpointPath, *, own: Loaded | None = None, trusted: bool = False) -> Believed:
    """What a checkpoint's configuration was when it was saved, as far as it is believed.

    `own` is the user's own configuration, whose keys win but for the model's. With `trusted` all of the checkpoint's
    configuration is taken, and `withheld` is what it asks for beyond what is believed of any checkpoint. Raises
    CheckpointError or ConfigError in a sentence where it can be no configuration, or would fill the memory.
    """
    whole = saved(path)
    found = believed(whole)
    if trusted:
        found = Believed(whole, found.withheld)
    if own is not None:
        found = found.with_own(own)
    rules.check_saved(found.config)
    if not trusted and (beyond := excesses(found.config, own.origins if own is not None else ())):
        raise ConfigError(
            f"{path / CONFIG}: {'; '.join(beyond)}; give your own configuration by --config, or --trust-checkpoint"
        )
    return found


def model_of(path: CheckpointPath) -> ModelConfig:
    """The model section alone, checked. Raises CheckpointError or ConfigError."""
    config = believed(saved(path)).config
    rules.check_saved(config)
    return config.model


def saved(path: CheckpointPath) -> Config:
    """All of it, as it was written, by whomever. Raises CheckpointError or ConfigError."""
    return in_effect(_text(path), _identity(path), str(path / CONFIG))


def _text(path: CheckpointPath) -> str:
    try:
        return read_small(path / CONFIG, CONFIG_BYTES).decode()
    except StoreError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path / CONFIG} ({error}): load another checkpoint") from error


def _identity(path: CheckpointPath) -> dict[str, Any]:
    state = selection.read_state(path)
    identity = state.get("identity", {}) if isinstance(state, dict) else None
    if not isinstance(identity, dict):
        raise CheckpointError(f"{path} has no readable identity in its state: load another checkpoint")
    return identity
