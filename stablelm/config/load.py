"""YAML files and `key.path=value` arguments become a `Config`; every mistake is named with its origin."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from stablelm.config import text
from stablelm.config.durations import parse_duration
from stablelm.config.hints import nearest
from stablelm.config.keys import (
    Key,
    assemble,
    describe,
    described,
    entry_name,
    find,
    is_mapping,
    keys,
    sections,
    takes_entries,
    takes_tuple,
    value_type,
    values,
)
from stablelm.config.read import Given, in_full, put, read_argument, read_content, read_file, read_values
from stablelm.config.schema import Config
from stablelm.config.typed_values import adapter, show
from stablelm.errors import ConfigError
from stablelm.paths import expand

__all__ = ["Loaded", "dump", "load", "loads", "nearest", "parse_duration"]


@dataclass(frozen=True)
class Loaded:
    """A configuration and, for each key that was given, where: `configs/a.yaml:3` or `argument train.lr=1e-3`.

    `asked` has the paths as they were written; in `config` a leading `~` is the home directory.
    """

    config: Config
    origins: dict[str, str]
    asked: Config


def load(
    files: list[str],
    overrides: list[str],
    *,
    world_size: int | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
    place: str = "",
) -> Loaded:
    """Merges `files` in order, then `overrides`, then the values `given` in Python at `place`; validates the result.

    Mappings are merged key by key, lists and scalars replaced; `data.validation={}` empties a
    mapping. Raises one ConfigError with a line for each problem; with `world_size` the rules between those keys that
    can be read, for so many ranks, are in it too.
    """
    problems: list[str] = []
    layers = [read_file(file, problems) for file in files]
    layers += [read_argument(argument, problems) for argument in overrides]
    layers.append(read_values(given, place))
    readable = not problems
    merged = _merge(layers, problems)
    origins = {name: given.origin for name, given in merged.items()}
    leaves, unread = _validate(merged, problems)
    config = assemble(_with_homes(leaves, origins, problems, unread))
    if problems and readable and world_size is not None:
        from stablelm.config import rules  # slow to import, so only where something is wrong

        problems += rules.problems(config, world_size, None, origins, unread)
    if problems:
        raise ConfigError("\n".join(problems))
    return Loaded(config, origins, assemble(leaves))


def loads(content: str, name: str) -> Config:
    """The Config of a YAML file's text, its paths as they were written; `name` stands for the file in messages.

    Raises ConfigError with a line for each problem.
    """
    problems: list[str] = []
    return assemble(_all_right(_merge([read_content(content, name, problems)], problems), problems))


def typed(given: dict[str, Any], origin: str) -> dict[str, Any]:
    """Values by key as the keys take them; ConfigError, which says `origin`, with a line for each that is none."""
    return _all_right({name: Given(value, origin) for name, value in given.items()}, [])


def _all_right(merged: dict[str, Given], problems: list[str]) -> dict[str, Any]:
    leaves, _ = _validate(merged, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return leaves


def _merge(layers: list[dict[str, Given]], problems: list[str]) -> dict[str, Given]:
    """Values by full name, later layers over earlier ones."""
    merged: dict[str, Given] = {}
    for layer in layers:
        for short, given in layer.items():
            name = in_full(short)
            if name in sections():
                problems.append(_no_section(name, given))
            else:
                put(merged, name, given)
    return merged


def _validate(merged: dict[str, Given], problems: list[str]) -> tuple[dict[str, Any], set[str]]:
    """The right values by key, and the names of keys that have none; appends what is wrong to `problems`."""
    leaves: dict[str, Any] = {}
    unread: set[str] = set()
    for name, given in merged.items():
        key, entry = find(name)
        if key is None:
            near = nearest(name)
            unread |= {near} if near else set()
            problems.append(_unknown(name, near, given))
            continue
        if given.value == {} and takes_entries(key.type):
            leaves[key.name] = {}
            continue
        if entry and entry_name(key, entry) is None:
            problems.append(f"{name}: {entry} must be a step, an integer from 0 up ({given.origin})")
            unread.add(key.name)
            continue
        value, problem = _convert(name, given, key, entry)
        if problem:
            problems.append(problem)
            unread.add(name)
        elif entry:
            leaves.setdefault(key.name, {})[entry_name(key, entry)] = value
        else:
            leaves[name] = value
    return leaves, unread


def _convert(name: str, given: Given, key: Key, entry: str) -> tuple[Any, str]:
    """The value as the key takes it, or a sentence about why it cannot be."""
    from pydantic import ValidationError  # slow to import, so only where something is set

    value, kind = given.value, value_type(key, entry)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # train.tokens=1e9 means an integer; a float key takes it back
    if isinstance(value, list) and takes_tuple(kind):
        value = tuple(value)
    try:
        return adapter(kind).validate_python(value, strict=True), ""
    except (ValidationError, OverflowError):
        pass
    expected, hint = described(key) if not entry else describe(kind), ""
    if isinstance(given.value, bool | int | float) and "string" in expected and "number" not in expected:
        hint = "; put it in quotes to make it a string"
    return None, f"{name}={show(given.value)} must be {expected}{hint} ({given.origin})"


def _with_homes(
    leaves: dict[str, Any], origins: dict[str, str], problems: list[str], unread: set[str]
) -> dict[str, Any]:
    """The values with every path expanded; appends to `problems` and `unread` what cannot be."""

    def expanded(name: str, value: Any) -> Any:
        try:
            if isinstance(value, list):
                return [expand(item, f"{name}=") for item in value]
            return expand(value, f"{name}=") if isinstance(value, str) else value
        except ConfigError as error:
            problems.append(f"{error} ({origins[name]})")
            unread.add(name)
            return value

    made = dict(leaves)
    for name, value in leaves.items():
        key = keys()[name]
        if is_mapping(key.type):
            made[name] = {
                entry: expanded(f"{name}.{entry}", item) if key.holds_path(entry) else item
                for entry, item in value.items()
            }
        elif key.holds_path():
            made[name] = expanded(name, value)
    return made


def _no_section(name: str, given: Given) -> str:
    inside = next(key for key in keys() if key.startswith(name + "."))
    return f"{name}={show(given.value)} must be a section, a mapping of keys such as {inside} ({given.origin})"


def _unknown(name: str, near: str | None, given: Given) -> str:
    hint = f", did you mean {near}?" if near else "; see docs/configuration.md"
    return f"unknown key {name}{hint} ({given.origin})"


def in_effect(config_yaml: str, identity: dict[str, Any], name: str) -> Config:
    """What a saved `config.yaml` asked for, with what its derived keys became for the run with this identity.

    Nothing is derived again, because another release or launcher may derive it differently. Keys that are not part of
    an identity, such as `train.micro_batch_size` and `checkpoint.dir`, stay None, and paths are as they were asked.
    `name` stands for the file in messages. Raises ConfigError if the text is no configuration, or the identity does not
    fit its keys.
    """
    asked = values(loads(config_yaml, name))
    became = {
        key: value
        for key, value in identity.items()
        if key in keys() and keys()[key].identity and asked[key] is None and value is not None
    }
    return assemble(asked | typed(became, f"the identity beside {name}"))


def dump(config: Config) -> str:
    """YAML of every key in the schema's order; `load` of it gives an equal Config."""
    tree: dict[str, Any] = {}
    for name, value in values(config).items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = list(value) if isinstance(value, tuple) else value
    return text.write(tree)
