"""Values of one key at a time: the check of a type, and how a value is shown in a message."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_type_hints

from stablelm.config import text
from stablelm.config.keys import describe
from stablelm.errors import ConfigError


@lru_cache
def adapter(kind: Any):
    """What takes or refuses a value of that type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def show(value: Any) -> str:
    """A value in YAML's own notation, shortened."""
    in_yaml = value is None or isinstance(value, str | int | float | list | tuple)
    words = text.write({"v": value})[2:].strip() if in_yaml else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        words = str(value)
    return words if len(words) <= 80 else words[:77] + "..."


def checked_options(kind: type, given: Mapping[str, Any]) -> None:
    """Raises ConfigError with a line for each of the values that the fields of an options dataclass do not take."""
    from pydantic import ValidationError

    own, hints, problems = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind), []
    for name, value in given.items():
        if name not in own:
            problems.append(f"unknown option {name}; it has {', '.join(own)}")
            continue
        try:
            taken = adapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            problems.append(f"{name}={show(value)} must be {describe(hints[name])}")
            continue
        allowed = own[name].metadata.get("range")
        if allowed is not None and taken is not None and not allowed.holds(taken):
            problems.append(f"{name}={show(value)} must be {allowed.words}")
    if problems:
        raise ConfigError("; ".join(problems))
