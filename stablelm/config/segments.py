"""What of a run's identity may change at a checkpoint, and how the identity remembers it.

An identity holds the latest values and, oldest first, the changes that led to them, as
{"step": 500, "keys": {"train.lr": [0.0003, 0.0001]}}: the steps up to 500 had the first value, later ones have the
second. So the settings of every step follow from the identity alone, whichever checkpoint the run returns to.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from stablelm.config.batch_sizes import BatchSizes
from stablelm.config.hints import nearest
from stablelm.config.keys import keys
from stablelm.config.schema import Config
from stablelm.json_text import Count

SEGMENTS = "run.segments"
BATCH = "train.global_batch_size"
CHANGEABLE = (
    "train.lr train.min_lr train.warmup_steps train.schedule train.cooldown_steps train.cooldown_shape "
    f"train.power_after train.power_exponent train.steps train.weight_decay train.grad_clip train.z_loss {BATCH}"
).split()
"""Keys that later steps may have other values of, while all that was trained so far stays what it is."""
FOLLOWS = {
    "train.min_lr": ("train.lr",),
    "train.cooldown_steps": ("train.steps", "train.schedule"),
    "train.power_after": ("train.warmup_steps",),
}
"""Keys that change with others where they are derived from them."""
_REASONS = {
    "model.": "the weights belong to it",
    "data.": "it decides what every batch holds, those that are trained already too",
    "run.seed": "it decides what every batch holds, those that are trained already too",
    "run.init_from": "it is what the run began with",
    "run.grow": "it is what the run began with",
    "train.betas": "Adam's averages were made with it",
    "train.eps": "Adam's averages were made with it",
    "train.optimizer": "its state belongs to it",
    "train.independent_decay": "it is part of the optimizer",
    "train.muon.": "it is part of the optimizer",
    "train.sophia.": "it is part of the optimizer",
    "train.sam.": "it is part of the optimizer",
    "train.ema": "the average was made with it",
    "train.moments": "Adam's averages are kept in it",
    "train.loss": "it is what the whole run minimises",
    "train.float8": "it is the arithmetic of the whole run",
    "train.precision": "it is the arithmetic of the whole run",
    "guards.": "after a rewind earlier steps are judged again",
}


class Segment(TypedDict):
    """A change: `step` is the last one before it, `keys` gives the values before and after."""

    step: Count
    keys: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


def problems(config: Config) -> Iterator[tuple[str, str]]:
    """(sentence, key) for each entry of `run.allow` that is not `CHANGEABLE`."""
    for name in config.run.allow:
        if name not in CHANGEABLE:
            yield f"run.allow: {_why_not(name)}", "run.allow"


def _why_not(name: str) -> str:
    if name not in keys():
        near = nearest(name)
        return f"unknown key {name}" + (f", did you mean {near}?" if near else "; see docs/changing_a_run.md")
    if name == "train.tokens":
        return "train.tokens counts by the steps that it makes; allow train.steps"
    if not keys()[name].identity:
        return f"{name} may change at any time; remove it from the list"
    why = next(why for start, why in _REASONS.items() if name.startswith(start))
    return f"{name} cannot change within a run, since {why}; start a new run from the weights by run.init_from"


def allowed(asked: Config) -> frozenset[str]:
    """The keys that may differ from the checkpoint: those of `run.allow`, and what is derived from them."""
    listed = set(asked.run.allow)
    derived = {
        name
        for name, sources in FOLLOWS.items()
        if getattr(asked.train, name.removeprefix("train.")) is None and listed & set(sources)
    }
    return frozenset(listed | derived)


def segments_of(identity: Mapping[str, Any]) -> list[Segment]:
    """The changes that an identity remembers, the oldest first."""
    return identity.get(SEGMENTS, [])


def with_segments(identity: Mapping[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
    """The identity with these changes; one without any does not mention them."""
    plain = {name: value for name, value in identity.items() if name != SEGMENTS}
    return plain | ({SEGMENTS: list(segments)} if segments else {})


def undone(identity: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """The identity as it was when only the first `kept` changes had been made."""
    values, segments = dict(identity), segments_of(identity)
    for segment in reversed(segments[kept:]):
        values |= {name: before for name, (before, _) in segment["keys"].items()}
    return with_segments(values, segments[:kept])


def refused(changes: Mapping[str, Sequence[Any]], step: int, data_step: int) -> list[str]:
    """A sentence for each allowed change that contradicts what is trained: `step` steps, `data_step` batches."""
    found = []
    if "train.steps" in changes and changes["train.steps"][1] < step:
        found.append(f"train.steps={changes['train.steps'][1]} is below the {step} steps that are finished; raise it")
    if BATCH in changes and data_step:
        before, after = (BatchSizes.saved(value) for value in changes[BATCH])
        past = {first for sizes in (before, after) for first, _ in sizes.stages if first < data_step}
        if any(before.at(first) != after.at(first) for first in past):
            earlier = {first: size for first, size in before.stages if first < data_step}
            found.append(
                f"{BATCH}={after.plain()} changes the {data_step} batches that are trained; keep their sizes and "
                f"change later ones, as {{{str(earlier)[1:-1]}, {data_step}: {after.at(data_step)}}}"
            )
    return found
