"""The schema seen as a flat table: one entry for each dotted key, and its type in words."""

import dataclasses
import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stablelm.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One leaf of the schema; `type` is its annotation."""

    name: str
    type: Any
    default: Any
    text: str
    unit: str
    identity: bool


@lru_cache
def keys() -> dict[str, Key]:
    """All keys by dotted name, in the schema's order."""
    return {key.name: key for key in _walk(Config, "")}


@lru_cache
def sections() -> dict[str, str]:
    """Dotted names of the sections and their texts, outer ones first."""
    return dict(_sections(Config, ""))


def _walk(section: type, prefix: str):
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        kind, name = hints[field.name], prefix + field.name.rstrip("_")
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _walk(kind, name + ".")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            told = field.metadata
            yield Key(name, kind, default, told["text"], told["unit"], told["identity"])


def _sections(section: type, prefix: str):
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield prefix + field.name, field.metadata["text"]
            yield from _sections(kind, f"{prefix}{field.name}.")


def values(config: Config) -> dict[str, Any]:
    """Value of every key of `config` by dotted name."""
    found = {}
    for name in keys():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part if hasattr(value, part) else f"{part}_")
        found[name] = value
    return found


def choices(name: str) -> tuple[str, ...]:
    """The values of a key that takes one of a few words, null left out; () for a key of another type."""
    kind = keys()[name].type
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


def is_mapping(kind: Any) -> bool:
    """Whether a key of this type takes named entries of the user's choice."""
    return get_origin(kind) is dict


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def describe(kind: Any) -> str:
    """A type in the words of an error message: `a whole number or null`."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _either([str(value) for value in arguments])
    if origin in (Union, types.UnionType):
        parts = [get_args(part) if get_origin(part) is Literal else [describe(part)] for part in arguments]
        return _either([word for words in parts for word in words])
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        if len(set(arguments)) > 1:
            return f"a list of {' and '.join(describe(part) for part in arguments)}"
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    assert origin is dict, f"no words for the type {kind}"
    return f"a mapping of names to {describe(arguments[1])}"


def _plural(kind: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}[kind]


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
