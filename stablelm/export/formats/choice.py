"""Which formats there are, what each must answer, and the first that fits a model."""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

from stablelm.errors import ConfigError
from stablelm.export.folding import Folded
from stablelm.export.weights import LazyTensor

STANDARD = ("llama", "qwen3", "gemma2", "gpt2")
"""Architectures of transformers, in the order in which `auto` tries them."""
OWN, GGUF = "hf", "gguf"
_MODULES = {OWN: "stablelm.export.hf_model.writer", GGUF: "stablelm.export.gguf"}


class Format(Protocol):
    """An architecture: a module of this package, or that of our own modelling file."""

    def obstacles(self, folded: Folded) -> list[str]:
        """Why it does not compute the model, each with what it would take; empty: it does."""
        ...

    def config(self, folded: Folded) -> dict[str, Any]:
        """The architecture's entries of config.json, without token ids and dtype."""
        ...

    def tensors(self, folded: Folded) -> Iterator[tuple[str, LazyTensor]]:
        """Every tensor by the architecture's own name."""
        ...


def format_of(name: str) -> Format:
    """The architecture of that name; `gguf` holds one of llama."""
    return cast(Format, import_module(_MODULES.get(name, f"stablelm.export.formats.{name}")))


def choose(requested: str, folded: Folded) -> str:
    """The name of the format to write: as requested, or for `auto` the first that fits, else `hf`.

    Raises ConfigError where the model cannot be written so.
    """
    obstacles: dict[str, list[str]] = {}
    for name in STANDARD if requested == "auto" else [requested]:
        obstacles[name] = format_of("llama" if name == GGUF else name).obstacles(folded) if _is_there(name) else []
        if not obstacles[name] and _is_there(name):
            return name
    if requested != "auto":
        if not _is_there(requested):
            raise ConfigError(f"--format {requested} is not available in this version; choose another")
        other = "" if requested == OWN else f"; train a model without these, or use --format {OWN}"
        raise ConfigError(f"--format {requested} does not compute this model: {'; '.join(obstacles[requested])}{other}")
    if not _is_there(OWN):
        nearest = min(obstacles, key=lambda name: len(obstacles[name]))
        raise ConfigError(
            f"no standard architecture computes this model; the nearest is {nearest}: {'; '.join(obstacles[nearest])}"
        )
    return choose(OWN, folded)


def _is_there(name: str) -> bool:
    module = _MODULES.get(name)
    if module is None:
        return True
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
