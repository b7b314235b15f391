"""YAML files and `key.path=value` arguments as flat values by dotted name, each with where it was given."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stablelm.config import packaged, text
from stablelm.config.keys import find, is_mapping, keys, sections, takes_list, takes_text, value_type
from stablelm.errors import ConfigError
from stablelm.methods import catalogue
from stablelm.paths import expand

SHORT_FORMS = {section: f"model.{section}" for section, kind in catalogue.options().items() if kind.SHORT_FORM}


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where."""

    value: Any
    origin: str


def in_full(name: str) -> str:
    """The key's full name, if `name` begins with a section's short form."""
    section, dot, rest = name.partition(".")
    return SHORT_FORMS.get(section, section) + dot + rest


def read_file(file: str, problems: list[str]) -> dict[str, Given]:
    """Values of a YAML file, or else of a packaged configuration, by dotted name; problems are added to `problems`."""
    try:
        path = Path(expand(file, "--config "))
        found = None if path.is_file() else packaged.find(file)
        content = (found or path).read_text(encoding="utf-8")
    except ConfigError as error:
        problems.append(str(error))
    except OSError as error:
        fix = f"name an existing YAML file{packaged.instead(file)}"
        problems.append(f"--config {file} cannot be read: {error.strerror}; {fix}")
    except UnicodeDecodeError:
        problems.append(f"--config {file} is not UTF-8 text; name a YAML file")
    else:
        return read_content(content, file, problems)
    return {}


def read_content(content: str, file: str, problems: list[str]) -> dict[str, Given]:
    """Values of the text of a YAML file, which `problems` calls `file`."""
    flat: dict[str, Given] = {}
    try:
        node = text.read(content)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise text.TextError("a configuration file must be a mapping of sections to keys", node.start_mark.line + 1)
        if node is not None:
            _flatten(node, "", lambda line: f"{file}:{line}", flat)
    except text.TextError as error:
        problems.append(f"{file}:{error.line}: {error}")
    except RecursionError:
        problems.append(f"{file}: nested too deeply, or a mapping that contains itself")
    return flat


def read_argument(argument: str, problems: list[str]) -> dict[str, Given]:
    """Values of `key.path=value`; what is wrong with it is added to `problems`.

    The value is taken literally unless it is a YAML scalar, or a list or mapping in brackets where the key takes one,
    without anything that YAML would leave out or put elsewhere: comments, anchors, tags, marks of documents.
    """
    name, equals, value = argument.partition("=")
    name, origin = name.strip(), f"argument {argument}"
    if not equals or not name:
        problems.append(f"argument {argument} must have the form key.path=value; a file is given by --config FILE")
        return {}
    if not _is_unicode(argument):
        problems.append(f"{origin} is not UTF-8 text; give a name that is")
        return {}
    flat: dict[str, Given] = {}
    try:
        node = _node(name, value)
        if isinstance(node, yaml.MappingNode):
            _flatten(node, name, lambda line: origin, flat)
        else:
            flat[name] = Given(node if isinstance(node, str) else text.plain(node), origin)
    except text.TextError as error:
        problems.append(f"{origin} cannot be read: {error}; quote the value")
    except RecursionError:
        problems.append(f"{origin} is nested too deeply")
    return {name: given for name, given in flat.items() if not _is_empty_section(name, given)}


def read_values(tree: Mapping[str, Any], place: str, prefix: str = "") -> dict[str, Given]:
    """Values of nested mappings, or of dotted names, by dotted name; `place` tells where they were given."""
    flat: dict[str, Given] = {}
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= read_values(value, place, f"{full}.")
        else:
            flat[full] = Given(_plain(value), f"{place}: {full}")
    return {name: given for name, given in flat.items() if not _is_empty_section(name, given)}


def _plain(value: Any) -> Any:
    """The text of a path, and Python's own numbers in place of NumPy's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _is_unicode(words: str) -> bool:
    try:
        words.encode()
    except UnicodeEncodeError:  # bytes of an argument that are no UTF-8 become surrogates
        return False
    return True


def _node(name: str, value: str) -> yaml.Node | str | None:
    """The YAML of an argument's value, or the value itself where it is taken literally. Raises TextError."""
    key, entry = find(in_full(name))
    kind = value_type(key, entry) if key is not None else None
    words, several = kind is not None and takes_text(kind), kind is not None and takes_list(kind)
    try:
        if not text.is_bare(value):
            return value
        node = text.read(value)
    except text.TextError:
        if words and not (several and value.lstrip().startswith("[")):
            return value
        raise
    return node if not words or _is_meant_as_yaml(node, several=several, entry=bool(entry)) else value


def _is_meant_as_yaml(node: yaml.Node | None, *, several: bool, entry: bool) -> bool:
    """Whether what is given to a key that takes any text is more than that text.

    `several`: the key takes lists too; `entry`: it is an entry of a mapping, which may hold further ones.
    """
    if isinstance(node, yaml.SequenceNode):
        return several and bool(node.flow_style)
    if isinstance(node, yaml.MappingNode):
        # {a,b} is a mapping to YAML, but the braces of a pattern to whoever names files.
        braces = all(item.value == "" for _, item in node.value)
        return entry and bool(node.flow_style) and not braces
    if not isinstance(node, yaml.ScalarNode):
        return True
    # Text without quotes is the value itself: YAML would strip blanks and join lines.
    one_line = node.start_mark.line == node.end_mark.line
    return one_line and (node.style is not None or not isinstance(text.plain(node), str))


def _is_empty_section(name: str, given: Given) -> bool:
    """`model:` with nothing below it, as when all its keys are comments."""
    if name in sections():
        return given.value is None or given.value == {}
    return given.value is None and name in keys() and is_mapping(keys()[name].type)


def _flatten(node: yaml.MappingNode, prefix: str, origin: Callable[[int], str], flat: dict[str, Given]) -> None:
    """Adds the entries below `node` to `flat` by dotted name; an empty mapping is an entry itself."""
    entries = text.items(node)
    if not entries and prefix:
        flat[prefix] = Given({}, origin(node.start_mark.line + 1))
    for name, value, line in entries:
        if name == "<<":
            fix = "give several --config files instead, which are merged in their order"
            raise text.TextError(f"YAML's merge key << is not supported; {fix}", line)
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(value, yaml.MappingNode) and value.value:
            _flatten(value, full, origin, flat)
            continue
        given = Given(text.plain(value), origin(line))
        if full in flat:
            raise text.TextError(f"{full} is given twice, first in {flat[full].origin}", line)
        if not _is_empty_section(full, given):
            flat[full] = given


def put(merged: dict[str, Given], name: str, given: Given) -> None:
    """Sets a value, in place of what was given for the name, for a mapping around it or for its entries."""
    parents = [name[: match.start()] for match in re.finditer(r"\.", name)]
    for other in [*parents, *(n for n in merged if n.startswith(name + "."))]:
        merged.pop(other, None)
    merged[name] = given
