"""YAML files and `key.path=value` arguments become a `Config`; every mistake is named with its origin."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from stablelm.config import text
from stablelm.config.keys import Key, describe, is_mapping, keys, sections, values
from stablelm.config.schema import Config
from stablelm.errors import ConfigError

CLOSE_ENOUGH = 0.6
SHORT_FORMS = {"deepscale": "model.deepscale"}


@dataclass(frozen=True)
class Loaded:
    """A configuration and, for each key that was given, where: `configs/a.yaml:3` or `argument train.lr=1e-3`."""

    config: Config
    origins: dict[str, str]


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where."""

    value: Any
    origin: str


def load(files: list[str], overrides: list[str]) -> Loaded:
    """Merges `files` in order, then `overrides`; validates the result.

    Mappings are merged key by key, lists and scalars replaced; `data.validation={}` empties a
    mapping. Raises one ConfigError with a line for each problem.
    """
    problems: list[str] = []
    merged: dict[str, Given] = {}
    for layer in [_read_file(file, problems) for file in files] + [
        _read_override(item, problems) for item in overrides
    ]:
        for short, given in layer.items():
            name = _in_full(short)
            if name in sections():
                problems.append(_no_section(name, given))
            else:
                _put(merged, name, given)
    config = _validate(merged, problems)
    if config is None:
        raise ConfigError("\n".join(problems))
    return Loaded(config, {name: given.origin for name, given in merged.items()})


def _in_full(name: str) -> str:
    """The key's full name, if `name` begins with a section's short form."""
    section, dot, rest = name.partition(".")
    return SHORT_FORMS.get(section, section) + dot + rest


def _put(merged: dict[str, Given], name: str, given: Given) -> None:
    parents = [name[: m.start()] for m in re.finditer(r"\.", name)]
    for other in [*parents, *(n for n in merged if n.startswith(name + "."))]:
        merged.pop(other, None)
    merged[name] = given


def _read_file(file: str, problems: list[str]) -> dict[str, Given]:
    flat: dict[str, Given] = {}
    try:
        node = text.read(Path(file).read_text(encoding="utf-8"))
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise text.TextError("a configuration file must be a mapping of sections to keys", node.start_mark.line + 1)
        if node is not None:
            _flatten(node, "", lambda line: f"{file}:{line}", flat)
    except OSError as error:
        problems.append(f"--config {file} cannot be read: {error.strerror}; name an existing YAML file")
    except UnicodeDecodeError:
        problems.append(f"--config {file} is not UTF-8 text; name a YAML file")
    except text.TextError as error:
        problems.append(f"{file}:{error.line}: {error}")
    except RecursionError:
        problems.append(f"{file}: nested too deeply, or a mapping that contains itself")
    return flat


def _read_override(argument: str, problems: list[str]) -> dict[str, Given]:
    flat: dict[str, Given] = {}
    name, equals, value = argument.partition("=")
    name = name.strip()
    if not equals or not name:
        problems.append(f"argument {argument} must have the form key.path=value; a file is given by --config FILE")
        return flat
    origin = f"argument {argument}"
    try:
        # An argument cannot refer to a YAML anchor, so a leading * is a glob.
        node = None if value.startswith("*") else text.read(value)
        if isinstance(node, yaml.MappingNode):
            _flatten(node, name, lambda line: origin, flat)
        else:
            flat[name] = Given(value if value.startswith("*") else text.plain(node), origin)
    except text.TextError as error:
        problems.append(f"{origin} cannot be read: {error}; quote the value")
    except RecursionError:
        problems.append(f"{origin} is nested too deeply")
    return {name: given for name, given in flat.items() if not _is_empty_section(name, given)}


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
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(value, yaml.MappingNode) and value.value:
            _flatten(value, full, origin, flat)
            continue
        given = Given(text.plain(value), origin(line))
        if full in flat:
            raise text.TextError(f"{full} is given twice, first in {flat[full].origin}", line)
        if not _is_empty_section(full, given):
            flat[full] = given


def _validate(merged: dict[str, Given], problems: list[str]) -> Config | None:
    """Appends what is wrong with the merged values to `problems`; the Config if nothing ever was."""
    leaves: dict[str, Any] = {}
    for name, given in merged.items():
        key, entry = _find(name)
        if key is None:
            problems.append(_unknown(name, given))
            continue
        if given.value == {} and is_mapping(key.type):
            leaves[key.name] = {}
            continue
        kind = get_args(key.type)[1] if entry else key.type
        value, problem = _convert(name, given, kind)
        if problem:
            problems.append(problem)
        elif entry:
            leaves.setdefault(key.name, {})[entry] = value
        else:
            leaves[name] = value
    return None if problems else _build(Config, leaves, "")


def _find(name: str) -> tuple[Key | None, str]:
    """The key that `name` sets, and the entry where that key is a mapping of the user's names."""
    if name in keys():
        return keys()[name], ""
    for key in keys().values():
        if is_mapping(key.type) and name.startswith(key.name + "."):
            return key, name[len(key.name) + 1 :]
    return None, ""


def _convert(name: str, given: Given, kind: Any) -> tuple[Any, str]:
    """The value as `kind`, or a sentence about why it is none."""
    from pydantic import ValidationError  # slow to import, so only where something is set

    value = given.value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # train.tokens=1e9 means a whole number; a float key takes it back
    if isinstance(value, list):
        value = tuple(value) if _takes_tuple(kind) else value
    try:
        return _adapter(kind).validate_python(value, strict=True), ""
    except (ValidationError, OverflowError):
        pass
    expected = describe(kind)
    shown = _show(given.value)
    hint = ""
    if isinstance(given.value, bool | int | float) and "text" in expected and "number" not in expected:
        hint = "; put it in quotes to make it text"
    return None, f"{name}={shown} must be {expected}{hint} ({given.origin})"


def _takes_tuple(kind: Any) -> bool:
    return any(getattr(part, "__origin__", None) is tuple for part in (kind, *get_args(kind)))


@lru_cache
def _adapter(kind: Any):
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _show(value: Any) -> str:
    """A value in YAML's own notation, shortened."""
    words = text.write({"v": value})[2:].strip() if not isinstance(value, dict) else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        words = str(value)
    return words if len(words) <= 80 else words[:77] + "..."


def _no_section(name: str, given: Given) -> str:
    inside = next(key for key in keys() if key.startswith(name + "."))
    return f"{name}={_show(given.value)} must be a section, a mapping of keys such as {inside} ({given.origin})"


def _unknown(name: str, given: Given) -> str:
    near = nearest(name)
    return (
        f"unknown key {name}"
        + (f", did you mean {near}?" if near else "; see docs/configuration.md")
        + f" ({given.origin})"
    )


def nearest(name: str) -> str | None:
    """The key most like `name`, for 'did you mean'; a right name under a wrong section comes first."""
    last = name.rpartition(".")[2].lower()

    def likeness(key: str) -> tuple[float, float]:
        own = difflib.SequenceMatcher(None, last, key.rpartition(".")[2]).ratio()
        return own, difflib.SequenceMatcher(None, name.lower(), key).ratio()

    # A misspelt name in its own section may be less like the right one than some short key elsewhere.
    best = max(keys(), key=lambda key: (likeness(key)[0] == 1.0, sum(likeness(key))))
    return best if likeness(best)[0] >= CLOSE_ENOUGH or likeness(best)[1] >= 0.8 else None


def _build(section: type, leaves: dict[str, Any], prefix: str) -> Any:
    made = {}
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        name = prefix + field.name.rstrip("_")
        if name in sections():
            made[field.name] = _build(hints[field.name], leaves, name + ".")
        elif name in leaves:
            made[field.name] = leaves[name]
    return section(**made)


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


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: str | float | None) -> float | None:
    """Seconds of `90`, `90s`, `10m`, `2h`, `MM:SS`, `HH:MM:SS` or `D-HH:MM:SS`; None stays None.

    Raises ConfigError for anything else and for what is not above zero.
    """
    if value is None:
        return None
    seconds = _seconds(str(value).strip())
    if seconds is None or not 0 < seconds < math.inf:
        raise ConfigError(
            f"run.time_limit={value} is not a length of time above zero; "
            "write seconds, 90s, 10m, 2h, MM:SS, HH:MM:SS or D-HH:MM:SS"
        )
    return seconds


def _seconds(words: str) -> float | None:
    if match := re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)([smhd]?)", words):
        return float(match[1]) * _UNITS[match[2] or "s"]
    if match := re.fullmatch(r"(?:(?:(?P<d>\d+)-)?(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)", words):
        d, h, m, s = (int(match[part] or 0) for part in "dhms")
        return float(((d * 24 + h) * 60 + m) * 60 + s)
    return None
