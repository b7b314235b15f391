"""Which formats there are, what each must answer, and the first that fits a model."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol, cast

from stablelm.errors import ConfigError
from stablelm.export.folding import Folded
from stablelm.export.weights import LazyTensor

STANDARD = ("llama", "qwen3", "gemma2", "gpt2")
"""In the order in which `auto` tries them."""
OWN = "hf"
GGUF = "gguf"


class Format(Protocol):
    """A standard architecture: a module of this package."""

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
    """The format of that name."""
    return cast(Format, import_module(f"stablelm.export.formats.{name}"))


def choose(asked: str, folded: Folded) -> str:
    """The name of the format to write: as asked, or for `auto` the first that fits, else `hf`.

    Raises ConfigError where the model cannot be written as asked.
    """
    if asked == OWN:
        return asked
    if asked == "auto":
        return next((name for name in STANDARD if not format_of(name).obstacles(folded)), OWN)
    architecture = "llama" if asked == GGUF else asked
    if obstacles := format_of(architecture).obstacles(folded):
        raise ConfigError(
            f"--format {asked}: the architecture {architecture} does not compute this model: {'; '.join(obstacles)}. "
            f"Train a model without these, or use --format {OWN}"
        )
    return asked
