"""On PYTHONPATH this makes each training step longer, so that a test can strike in the middle.

By PACE_SECONDS, a number or the name of a file that holds one.
"""

import importlib.util
import os
import sys
import time

STEP = "stablelm.train.step"


class Pace:
    """Finds the module of the training step by the other finders and slows its function down."""

    def find_spec(self, name, path=None, target=None):
        if name != STEP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: slow_down(module, load)  # type: ignore[method-assign]
        return spec


def slow_down(module, load) -> None:
    load(module)
    step = module.train_step

    def slower(*arguments, **named):
        time.sleep(pause())
        return step(*arguments, **named)

    module.train_step = slower


def pause() -> float:
    told = os.environ["PACE_SECONDS"]
    try:
        return float(told)
    except ValueError:
        with open(told) as stream:
            return float(stream.read() or 0)


if "PACE_SECONDS" in os.environ:
    sys.meta_path.insert(0, Pace())  # type: ignore[arg-type]
