"""Which formats there are, what each must answer, and the first that fits a model."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol, cast

from stablelm.errors import ConfigError
from stablelm.export.folding import Folded
from stablelm.export.weights import LazyTensor

STANDARD = ("llama", "qwen3", "gemma2", "gpt2")
"""Architectures of transformers, in the order in which `auto` tries them."""
LAYER_NORMS = "gpt2"
"""The one whose norms are layer norms."""
OWN, GGUF = "hf", "gguf"
"""With our own modelling file; for llama.cpp, what `gguf_architecture` computes."""


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
    """The architecture of that name: one of STANDARD, or OWN."""
    module = "stablelm.export.hf_model.writer" if name == OWN else f"stablelm.export.formats.{name}"
    return cast(Format, import_module(module))


def gguf_architecture(folded: Folded) -> str:
    """The architecture of transformers whose tensors a GGUF file of the model holds."""
    return "qwen3" if folded.model.attention.qk_norm else "llama"


def choose(requested: str, folded: Folded) -> str:
    """The name of the format to write: as requested, or for `auto` the first that fits, else `hf`.

    Raises ConfigError where the model cannot be written so.
    """
    if requested == "auto":
        fitting = (name for name in STANDARD if not format_of(name).obstacles(folded))
        return next(fitting, None) or choose(OWN, folded)
    obstacles = format_of(gguf_architecture(folded) if requested == GGUF else requested).obstacles(folded)
    if obstacles:
        other = "" if requested == OWN else f"; train a model without these, or use --format {OWN}"
        raise ConfigError(f"--format {requested} does not compute this model: {'; '.join(obstacles)}{other}")
    return requested
