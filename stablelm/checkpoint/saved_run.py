"""What a checkpoint says of its run, state.json and config.yaml: the one place at which they are read.

A checkpoint may come from anybody. What is taken of its configuration without the user's consent: `config.trust`.
"""

from dataclasses import replace
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.checkpoint.manifest import CONFIG, STATE
from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.config import rules
from stablelm.config.identity import Identity
from stablelm.config.load import Loaded, in_effect
from stablelm.config.schema import Config, ModelConfig
from stablelm.config.trust import METHOD, Believed, believed, excesses
from stablelm.errors import CheckpointError, ConfigError
from stablelm.json_text import Count, Number, parse
from stablelm.methods import catalogue
from stablelm.printable import printable
from stablelm.small_files import read_small

CONFIG_BYTES = 4 << 20
Cursor = Annotated[list[Count], Field(min_length=5, max_length=5)]
"""Epoch, entry, block, index and offset (see `data.lanes`)."""
EvaluatedStep = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Lane = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Jump = Annotated[list[Count], Field(min_length=2, max_length=2)]
Judged = Annotated[list[Number], Field(min_length=3, max_length=3)]


class SavedPosition(TypedDict):
    """Where the next batch begins: the place of each lane that has moved, in its only source or by source."""

    data_step: Count
    lanes: dict[Lane, Cursor | dict[str, Cursor]]


class Guards(TypedDict, total=False):
    """What `train.guards` knows."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    skipped_steps: Count
    skipped_in_a_row: Count
    spikes: Count
    rewinds: Count
    jumps: list[Jump]
    window: list[Judged]


class State(TypedDict):
    """Everything of a run that is not a tensor."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: Count
    tokens: Count
    data: SavedPosition
    identity: Identity  # type: ignore[valid-type]
    guards: NotRequired[Guards]
    evaluation_due: NotRequired[bool]
    evaluations: NotRequired[dict[EvaluatedStep, dict[str, Number]]]
    skipped_rows: NotRequired[Count]


def read_state(path: CheckpointPath) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError."""
    try:
        return parse(read_small(path / STATE), State)  # type: ignore[return-value]
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / STATE} ({error}): load another checkpoint") from error


def read_configuration(path: CheckpointPath, *, own: Loaded | None = None, trusted: bool = False) -> Believed:
    """What a checkpoint's configuration was when it was saved, as far as it is believed.

    `own` is the user's own configuration, whose keys win but for the model's. With `trusted` all of the checkpoint's
    configuration is taken, and `withheld` is what it asks for beyond what is believed of any checkpoint. Raises
    CheckpointError or ConfigError in a sentence where it can be no configuration, or would fill the memory.
    """
    whole = saved(path)
    found = believed(whole)
    if not trusted:
        _refuse_unknown_code(path, found)
    else:
        found = Believed(whole, found.withheld)
    if own is not None:
        found = found.with_own(own)
    rules.check_saved(found.config)
    if found.config.train.precision is None:  # every complete identity has it
        raise CheckpointError(f"{path / STATE} does not give train.precision: load another checkpoint")
    # An identity gives the axes; where it lacks one the method's own is meant.
    found = replace(found, config=replace(found.config, model=catalogue.apply_method(found.config.model)))
    if not trusted and (beyond := excesses(found.config, own.origins if own is not None else ())):
        raise ConfigError(
            f"{path / CONFIG}: {'; '.join(beyond)}; give your own configuration by --config, or --trust-checkpoint"
        )
    return found


def model_of(path: CheckpointPath, *, trusted: bool = False) -> ModelConfig:
    """The model section alone, checked. Raises CheckpointError or ConfigError.

    A method that is named by import path is imported only if the checkpoint is `trusted`.
    """
    whole = saved(path)
    if trusted:
        catalogue.find(whole.model.method)
    found = believed(whole)
    _refuse_unknown_code(path, found)
    rules.check_saved(found.config)
    return found.config.model


def _refuse_unknown_code(path: CheckpointPath, found: Believed) -> None:
    if METHOD in found.withheld:
        raise ConfigError(
            f"{path / CONFIG} has model.method={printable(str(found.withheld[METHOD]))}, which is code that is not "
            "imported at a checkpoint's word; give your own configuration with that method by --config, or "
            "--trust-checkpoint"
        )


def saved(path: CheckpointPath) -> Config:
    """All of it, as it was written, by whomever. Raises CheckpointError or ConfigError."""
    return in_effect(_text(path), read_state(path)["identity"], str(path / CONFIG))


def _text(path: CheckpointPath) -> str:
    try:
        return read_small(path / CONFIG, CONFIG_BYTES).decode()
    except StoreError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path / CONFIG} ({error}): load another checkpoint") from error
