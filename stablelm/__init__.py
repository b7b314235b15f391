"""stablelm: distributed pretraining of very deep language models.

The public functions are imported when they are first asked for, so that `import stablelm` loads neither torch nor
anything else that is slow: docs/library.md.
"""

import inspect
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablelm.evaluate.generation.loaded_model import generate as generate
    from stablelm.evaluate.generation.loaded_model import load_model as load_model
    from stablelm.evaluate.text_scores import score as score
    from stablelm.library import evaluate as evaluate
    from stablelm.library import export as export
    from stablelm.library import load_config as load_config
    from stablelm.library import plan as plan
    from stablelm.library import probe as probe
    from stablelm.library import train as train
    from stablelm.tokenizers import load_tokenizer as load_tokenizer

__version__ = "0.2.0"

_WHERE = {
    "generate": "stablelm.evaluate.generation.loaded_model",
    "load_config": "stablelm.library",
    "load_model": "stablelm.evaluate.generation.loaded_model",
    "load_tokenizer": "stablelm.tokenizers",
    "score": "stablelm.evaluate.text_scores",
}
_PACKAGES = ("evaluate", "export", "plan", "probe", "train")
__all__ = ["evaluate", "export", "generate", "load_config", "load_model", "load_tokenizer", "plan", "probe", "score"]
__all__ += ["train"]


class _CallablePackage(ModuleType):
    """A package that is also the public function of its name: an import in it binds that name to the package."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function()(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(import_module("stablelm.library"), self.__name__.rpartition(".")[2])


for _name in _PACKAGES:
    import_module(f"stablelm.{_name}").__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    """The public functions whose names are no packages."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
