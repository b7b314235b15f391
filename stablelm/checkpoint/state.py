"""What `state.json` of a checkpoint holds, checked when it is read."""

from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.config.identity import Identity
from stablelm.json_text import Count, Number

Cursor = Annotated[list[Count], Field(min_length=5, max_length=5)]
"""Epoch, entry, block, index and offset (see `data.lanes`)."""
Lane = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Jump = Annotated[list[Count], Field(min_length=2, max_length=2)]
Judged = Annotated[list[Number], Field(min_length=3, max_length=3)]


class Position(TypedDict):
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
    data: Position
    identity: Identity  # type: ignore[valid-type]
    guards: NotRequired[Guards]
    evaluation_due: NotRequired[bool]
    skipped_rows: NotRequired[Count]
