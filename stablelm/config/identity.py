"""What a run is: the keys that must be equal on resume, and how they may grow."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.config.keys import keys, values
from stablelm.config.schema import Config
from stablelm.config.segments import SEGMENTS, Segment
from stablelm.json_text import Count
from stablelm.methods import catalogue
from stablelm.methods.pre_ln import PRE_LN

# Not compared: the axes say what a method's name means, the steps what the tokens come to, and segments what was.
DESCRIPTIVE = ("model.method", "train.tokens", SEGMENTS)
# How rows are dealt to lanes, see `data.lanes`; 1 in runs that do not say it.
ORDER, ORDER_KEY = 2, "data.order"
LENGTH = ("train.steps", "train.cooldown_steps")


# What may be calculated with in a saved identity; all other keys are only compared.
Identity = TypedDict(
    "Identity",
    {
        "train.schedule": str,
        "train.steps": Count,
        "train.cooldown_steps": Count | None,
        "train.warmup_steps": Count,
        "data.tokenizer": str,
        "train.global_batch_size": Count | dict[Annotated[str, Field(pattern="^[0-9]{1,18}$")], Count],
        "run.segments": list[Segment],
    },
    total=False,
)
Identity.__pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[attr-defined]


def identity(
    config: Config, *, base_names: Sequence[str] | Mapping[str, Sequence[str]], tokenizer_sha256: str
) -> dict[str, Any]:
    """Identity keys of a resolved configuration by dotted name, as plain JSON values.

    `data.path` becomes the base names of the files (of each source where there are several) and `data.tokenizer` the
    tokenizer's hash, so that the same data in another place is the same run.
    """
    found = {name: value for name, value in values(config).items() if keys()[name].identity}
    names = (
        {name: list(own) for name, own in base_names.items()} if isinstance(base_names, Mapping) else list(base_names)
    )
    weights = {name: value for name, value in config.data.mixture.items() if not name.endswith(".path")}
    found |= {"data.path": names, "data.mixture": weights, "data.tokenizer": tokenizer_sha256, ORDER_KEY: ORDER}
    found["train.global_batch_size"] = config.train.batch_sizes.plain()
    return json.loads(json.dumps(found))


def changes(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values of two identities by each key in which they differ."""
    saved = _whole(saved, current)
    names = [name for name in {**saved, **current} if name not in DESCRIPTIVE]
    return {name: (saved.get(name), current.get(name)) for name in names if saved.get(name) != current.get(name)}


def differences(
    saved: dict[str, Any], current: dict[str, Any], step: int | None = None, allowed: Collection[str] = ()
) -> list[str]:
    """A sentence for each key in which two identities differ; none if one run can continue the other.

    `step` is the finished step to continue from; None: not known yet, so the earliest. `allowed` keys may differ.
    """
    different = {name: values for name, values in changes(saved, current).items() if name not in allowed}
    if different and set(different) <= set(LENGTH) and may_extend(_whole(saved, current), current, step or 0):
        return []
    return [_sentence(name, *values) for name, values in different.items()]


def _whole(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """A run saved before a key existed had what is the key's default now, of an axis what a plain model has."""
    axes = [catalogue.values(axis).get(str(saved.get(f"model.{key}"))) for axis, key in catalogue.KEYS.items()]
    earlier = {name: value for axis in axes if axis is not None for name, value in axis.earlier.items()}
    saved = earlier | saved
    defaults = {name: json.loads(json.dumps(keys()[name].default)) for name in current if name in keys()}
    plain = {f"model.{name}": value for name, value in PRE_LN.defaults.items()}
    defaults |= {name: plain[name] for name, value in defaults.items() if value is None and name in plain}
    return {ORDER_KEY: 1} | defaults | saved


def may_extend(saved: dict[str, Any], current: dict[str, Any], step: int) -> bool:
    """Whether the run may become as long as `current` says, with its first `step` steps as they were.

    True if it does not shrink and its learning rate up to `step` does not depend on its length: the
    schedule is constant, or wsd or power before its cooldown.
    """
    if saved["train.steps"] is None:  # a damaged one, which does not say
        return False
    if current["train.schedule"] != saved["train.schedule"] or current["train.steps"] < saved["train.steps"]:
        return False
    if saved["train.schedule"] == "constant":
        return True
    if None in (saved["train.cooldown_steps"], current["train.cooldown_steps"]):
        return False
    starts = [
        max(length["train.warmup_steps"], length["train.steps"] - length["train.cooldown_steps"])
        for length in (saved, current)
    ]
    return saved["train.schedule"] in ("wsd", "power") and step <= min(starts)


def _sentence(name: str, saved: Any, current: Any) -> str:
    if name == ORDER_KEY:
        return (
            f"{name}: saved by a program that reads the rows of files in order {saved}, now {current}; continue with "
            "that program, or start a new run from the weights by run.init_from"
        )
    if isinstance(saved, list) and isinstance(current, list):
        saved, current = _what_only_one_has(saved, current)
    hint = (
        " (it may grow where train.schedule is constant, or wsd or power before its cooldown)"
        if name == "train.steps"
        else ""
    )
    return f"{name}: saved with {_show(saved)}, now {_show(current)}{hint}"


def _what_only_one_has(one: list, other: list) -> tuple[Any, Any]:
    """Long lists of files differ in a few: only those are worth reading."""
    if len(one) <= 4 and len(other) <= 4:
        return one, other
    words = {id(items): {json.dumps(item) for item in items} for items in (one, other)}
    only_one, only_other = (
        [item for item in a if json.dumps(item) not in words[id(b)]] for a, b in ((one, other), (other, one))
    )
    return f"{len(one)} entries, {only_one} only here", f"{len(other)} entries, {only_other} only here"


def _show(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value)
    return words if len(words) <= 120 else words[:117] + "..."
