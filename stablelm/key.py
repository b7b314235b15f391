"""How a configuration section documents its keys: shared by the schema and by the methods' own options."""

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a number must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Range("at least 1", lambda v: v >= 1)
ABOVE_0 = Range("above 0", lambda v: v > 0)


def key(
    default: Any,
    text: str,
    *,
    unit: str = "",
    identity: bool = False,
    path: bool | tuple[str, ...] | None = None,
    axis: str = "",
    range: Range | None = None,
) -> Any:
    """A documented dataclass field; mutable defaults are copied for each instance.

    `path`: whether a string that the key takes is a path, where `~` is the home directory; every key that takes any
    string says so. Of a mapping: all its entries, or the named ones. `axis`: the axis of the method space whose values
    the key takes, see `methods.axes`. `range`: of a number on its own.
    """
    metadata = {"text": text, "unit": unit, "identity": identity, "path": path, "axis": axis, "range": range}
    if isinstance(default, (list, dict, type)):
        make = default if isinstance(default, type) else lambda: default.copy()
        # What cannot be hashed is left out of the hash, not of equality.
        return field(default_factory=make, metadata=metadata, hash=dataclasses.is_dataclass(default))
    return field(default=default, metadata=metadata)
