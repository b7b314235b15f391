"""Objects that a configuration names by import path."""

import importlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from stablelm.errors import ConfigError

FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@lru_cache
def named(path: str) -> Any:
    """What `package.module:name` names. Raises ConfigError, without the key, where there is nothing of that name."""
    if not FORM.fullmatch(path):
        raise ConfigError("not an import path; write package.module:name")
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
        raise ConfigError(f"the module {name} does not define {attribute}; name something it defines")
    return found


def function(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises ConfigError, without the key, if it is none."""
    found = named(path)
    if not callable(found):
        _, _, attribute = path.partition(":")
        raise ConfigError(f"{attribute} is a {type(found).__name__}, not a function; name a function")
    return found


def failure(error: Exception) -> str:
    """What a user's function raised and where, for the caller that caught it: `ValueError: no (own.py, line 3)`."""
    raised = error.__traceback__.tb_next if error.__traceback__ is not None else None
    if raised is None:  # called with the wrong arguments, or not written in Python
        return f"{type(error).__name__}: {error}"
    file = raised.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{type(error).__name__}: {error} ({file}, line {raised.tb_lineno})"
