"""The sets of `data.validation`: where each lies and which column holds its text, with the rules they must keep."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from stablelm.config.schema import DataConfig

NAME = re.compile(r"[A-Za-z0-9_-]+")
KEYS = ("path", "text_column")


@dataclass(frozen=True)
class ValidationPath:
    """A path as it was written, and the key or column that holds the text there."""

    path: str | list[str]
    text_column: str


def sets(data: DataConfig) -> dict[str, ValidationPath]:
    """Validation sets by name, `validation_path` as 'default'; entries that `problems` names are left out."""
    paths: dict[str, str | list[str]] = {}
    columns: dict[str, str] = {}
    for entry, value in data.validation.items():
        name, _, rest = entry.partition(".")
        if rest == "text_column":
            columns[name] = str(value)
        elif rest in ("", "path"):
            paths[name] = value if isinstance(value, str) else list(value)
    if data.validation_path is not None:
        paths["default"] = data.validation_path
    return {name: ValidationPath(path, columns.get(name, data.text_column)) for name, path in paths.items()}


def problems(data: DataConfig) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """(sentence, key or keys) for each mistake in `data.validation`."""
    for entry, value in data.validation.items():
        name, _, rest = entry.partition(".")
        key = f"data.validation.{entry}"
        if not NAME.fullmatch(name):
            yield f"{key}: the name of a validation set has only letters, digits, _ and -; rename it", key
        elif rest and rest not in KEYS:
            yield f"{key}: a validation set has a path and a text_column; give one of these", key
        elif rest == "text_column" and (not isinstance(value, str) or not value.strip()):
            yield f"{key} must name the key or column that holds the text", key
        elif rest == "text_column" and name not in sets(data):
            yield f"data.validation.{name} has no path; give one, as in data.validation.{name}.path=...", key
    if data.validation_path is not None and {"default", "default.path"} & set(data.validation):
        both = ("data.validation_path", "data.validation.default")
        yield " and ".join(both) + " both give the validation set 'default'; drop one", both
