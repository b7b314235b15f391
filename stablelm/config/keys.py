"""The schema seen as a flat table: one entry for each dotted key, and its type in words."""

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stablelm.config.schema import Config, ModelConfig
from stablelm.key import Range
from stablelm.methods import catalogue


@dataclass(frozen=True)
class Key:
    """One leaf of the schema; `type` is its annotation."""

    name: str
    type: Any
    default: Any
    text: str
    unit: str
    identity: bool
    axis: str
    """The axis of the method space whose values it takes; '' for any other key."""
    range: Range | None
    path: bool | tuple[str, ...] | None
    """Whether its text is a path; of a mapping: entries NAME and NAME.path, or those listed. None: not said."""

    def holds_path(self, entry: str = "") -> bool:
        """Whether text that is given for the key, or for an entry of it, is a path."""
        if isinstance(self.path, tuple):
            return entry in self.path
        return bool(self.path) and entry.partition(".")[2] in ("", "path")


type_hints = lru_cache(get_type_hints)


@lru_cache
def keys() -> dict[str, Key]:
    """All keys by dotted name, in the schema's order."""
    return {found.name: found for found in _walk(Config, "") if isinstance(found, Key)}


@lru_cache
def sections() -> dict[str, str]:
    """Dotted names of the sections and their texts, outer ones first."""
    return dict(found for found in _walk(Config, "") if not isinstance(found, Key))


def _walk(section: type, prefix: str) -> Iterator[Key | tuple[str, str]]:
    """The keys of a section, and name and text of each section in it."""
    hints = type_hints(section)
    for field in dataclasses.fields(section):
        kind, name = hints[field.name], prefix + field.name.rstrip("_")
        if field.metadata.get("sections"):
            for inner, options in catalogue.options().items():
                yield prefix + inner, str(options.__doc__).rstrip(".")
                yield from _walk(options, f"{prefix}{inner}.")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield name, field.metadata["text"]
            yield from _walk(kind, name + ".")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Key(name, kind, default, **field.metadata)


def values(config: Config) -> dict[str, Any]:
    """Value of every key of `config` by dotted name."""
    return {name: _value(config, name) for name in keys()}


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        if isinstance(value, ModelConfig) and part in catalogue.options():
            value = value.option(catalogue.options()[part])
        else:
            value = getattr(value, part if hasattr(value, part) else f"{part}_")
    return value


def find(name: str) -> tuple[Key | None, str]:
    """The key that `name` sets, and the entry where that key is, or may be, a mapping of the user's names."""
    if name in keys():
        return keys()[name], ""
    for key in keys().values():
        if takes_entries(key.type) and name.startswith(key.name + "."):
            return key, name[len(key.name) + 1 :]
    return None, ""


def assemble(values: Mapping[str, Any]) -> Config:
    """The Config with these values by dotted name; keys that are left out have their defaults."""
    return _assemble(Config, values, "")


def _assemble(section: type, values: Mapping[str, Any], prefix: str) -> Any:
    made, hints = {}, type_hints(section)
    for field in dataclasses.fields(section):
        name = prefix + field.name.rstrip("_")
        if field.metadata.get("sections"):
            options = (_assemble(kind, values, f"{prefix}{inner}.") for inner, kind in catalogue.options().items())
            made[field.name] = tuple(own for own in options if own != type(own)())
        elif name in sections():
            made[field.name] = _assemble(hints[field.name], values, name + ".")
        elif name in values:
            made[field.name] = values[name]
    return section(**made)


def value_type(key: Key, entry: str) -> Any:
    """The type of a key's value, or of an entry's where one is named."""
    return get_args(_mapping(key.type))[1] if entry else key.type


def entry_name(key: Key, entry: str) -> str | int | None:
    """An entry's name as the key's mapping holds it; None if it cannot be one."""
    if get_args(_mapping(key.type))[0] is str:
        return entry
    return int(entry) if re.fullmatch("0|[1-9][0-9]{0,17}", entry) else None


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
    """The values of a key that takes one of a few words, null left out; () for a key of another type.

    Of an axis those that stablelm has; a method named by import path may have more.
    """
    if keys()[name].axis:
        return tuple(catalogue.values(keys()[name].axis))
    parts = _parts(keys()[name].type)
    return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


def is_mapping(kind: Any) -> bool:
    """Whether a key of this type takes named entries of the user's choice."""
    return get_origin(kind) is dict


def takes_entries(kind: Any) -> bool:
    """Whether a key of this type takes named entries, beside other values or not."""
    return _mapping(kind) is not None


def _mapping(kind: Any) -> Any:
    return next((part for part in _parts(kind) if is_mapping(part)), None)


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}


def described(key: Key) -> str:
    """The values that a key takes, in the words of an error message."""
    return one_of([*choices(key.name), "null"]) if key.axis else describe(key.type)


def describe(kind: Any) -> str:
    """A type in the words of an error message: `an integer or null`."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return one_of([str(value) for value in arguments])
    if origin in (Union, types.UnionType):
        parts = [get_args(part) if get_origin(part) is Literal else describe(part).split(" or ") for part in arguments]
        return one_of([word for words in parts for word in words])
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        if len(set(arguments)) > 1:
            return f"a list of {' and '.join(describe(part) for part in arguments)}"
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    assert origin is dict, f"no words for the type {kind}"
    if arguments[0] is int:
        return f"a mapping of steps to {_plural(arguments[1])}"
    return f"a mapping of names to {describe(arguments[1])}"


def _plural(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return describe(kind)
    return {int: "integers", float: "numbers", str: "strings"}[kind]


def one_of(options: list[str]) -> str:
    """`a, b or c`."""
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
