"""The schema seen as a flat table: one entry for each dotted key, and its type in words."""

import dataclasses
import types
from collections.abc import Mapping
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
    path: bool | tuple[str, ...] | None
    """Whether its text is a path; of a mapping: entries NAME and NAME.path, or those listed. None: not said."""

    def holds_path(self, entry: str = "") -> bool:
        """Whether text that is given for the key, or for an entry of it, is a path."""
        if isinstance(self.path, tuple):
            return entry in self.path
        return bool(self.path) and entry.partition(".")[2] in ("", "path")


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
            yield Key(name, kind, default, told["text"], told["unit"], told["identity"], told["path"])


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


def find(name: str) -> tuple[Key | None, str]:
    """The key that `name` sets, and the entry where that key is a mapping of the user's names."""
    if name in keys():
        return keys()[name], ""
    for key in keys().values():
        if is_mapping(key.type) and name.startswith(key.name + "."):
            return key, name[len(key.name) + 1 :]
    return None, ""


def assemble(values: Mapping[str, Any]) -> Config:
    """The Config with these values by dotted name; keys that are left out have their defaults."""
    return _assemble(Config, values, "")


def _assemble(section: type, values: Mapping[str, Any], prefix: str) -> Any:
    made, hints = {}, get_type_hints(section)
    for field in dataclasses.fields(section):
        name = prefix + field.name.rstrip("_")
        if name in sections():
            made[field.name] = _assemble(hints[field.name], values, name + ".")
        elif name in values:
            made[field.name] = values[name]
    return section(**made)


def value_type(key: Key, entry: str) -> Any:
    """The type of a key's value, or of an entry's where one is named."""
    return get_args(key.type)[1] if entry else key.type


def takes_text(kind: Any) -> bool:
    """Whether any text is a value of the type."""
    return str in _parts(kind)


def takes_list(kind: Any) -> bool:
    return any(get_origin(part) in (list, tuple) for part in _parts(kind))


def takes_tuple(kind: Any) -> bool:
    return any(get_origin(part) is tuple for part in _parts(kind))


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def choices(name: str) -> tuple[str, ...]:
    """The values of a key that takes one of a few words, null left out; () for a key of another type."""
    parts = _parts(keys()[name].type)
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
