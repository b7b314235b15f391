"""The process in which steps are simulated: it loads the device before torch, and runs one request after the other."""

import traceback
from collections.abc import Callable
from typing import Any


def start() -> None:
    """Before anything else in the process."""
    from simulated_gpu import fake_cuda

    fake_cuda.load()
    from simulated_gpu import simulation

    simulation.prepare()


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A function's result; RuntimeError with its traceback for what it raises, which may not be picklable."""
    try:
        return function(*arguments, **options)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None
