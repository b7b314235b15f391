"""stablelm: distributed pretraining of very deep language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablelm.data.tokenizers import load_tokenizer as load_tokenizer
    from stablelm.evaluate.generation.loaded_model import generate as generate
    from stablelm.evaluate.generation.loaded_model import load_model as load_model

__version__ = "0.2.0"

_WHERE = {
    "generate": "stablelm.evaluate.generation.loaded_model",
    "load_model": "stablelm.evaluate.generation.loaded_model",
    "load_tokenizer": "stablelm.data.tokenizers",
}
__all__ = ["generate", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
