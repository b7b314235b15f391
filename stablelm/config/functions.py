"""Functions that a configuration names by import path."""

import importlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from stablelm.errors import ConfigError

FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@lru_cache
def function(path: str) -> Callable[..., Any]:
    """What `package.module:function` names. Raises ConfigError, without the key, when it cannot be had."""
    if not FORM.fullmatch(path):
        raise ConfigError("is no import path; write package.module:function")
    name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(name)
    # A module may fail in any way while it is imported.
    except Exception as error:
        raise ConfigError(
            f"cannot be imported ({type(error).__name__}: {error}); put the folder of {name.partition('.')[0]} on "
            "PYTHONPATH, or install it"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"the module {name} has no {attribute}; name a function of it")
    if not callable(found):
        raise ConfigError(f"{attribute} in {name} is a {type(found).__name__}, not a function; name one")
    return found
