"""Which text the validation sets of a configuration are, and how it is read."""

from dataclasses import replace

from stablelm.config import validation_sets
from stablelm.config.schema import Config
from stablelm.data import inspection
from stablelm.data.storage.options import ReadOptions


def validation_paths(config: Config) -> dict[str, str | list[str]]:
    """Validation sets by name; the embedded corpus brings its own."""
    paths = {name: each.path for name, each in validation_sets.sets(config.data).items()}
    if not paths and config.data.path == "embedded" and not config.data.mixture:
        paths["default"] = "embedded"
    return {name: inspection.asked(config.data, path, split="validation") for name, path in paths.items()}


def validation_options(config: Config, name: str) -> ReadOptions:
    """How the text of a validation set is read."""
    named = validation_sets.sets(config.data).get(name)
    options = ReadOptions.of(config.data)
    return options if named is None else replace(options, text_column=named.text_column)
