"""The loggers that `observe.sinks` names: whether they can be used, and each at work in the background.

A logger is a file `<name>_sink.py` here, which defines `open_run` (a Sink of a RunInfo), `load` (imports its library),
`problem` (why it cannot be used) and `where` (a command that shows its curves).
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

from stablelm.config.schema import Config
from stablelm.errors import ConfigError, Problems
from stablelm.observe.progress import Progress
from stablelm.observe.sinks.background import Background
from stablelm.observe.sinks.once import Once, figures
from stablelm.observe.sinks.run_info import RunInfo, Sink, run_id, run_info

TENSORBOARD = "tensorboard"


def check_loggers(config: Config) -> None:
    """ConfigError with a sentence for each logger that is not installed or has nobody logged in."""
    problems = Problems()
    for name in _named(config):
        with problems.collecting():
            if problem := _missing(name) or _refused(name, config):
                raise ConfigError(f"observe.sinks: {name} {problem}, or take {name} out of observe.sinks")
    problems.raise_any()


def _missing(name: str) -> str:
    """What to do about a package that is not there; '' if it is."""
    if importlib.util.find_spec(name) is not None:
        return ""
    return f"is not installed; {_install(name)}"


def _refused(name: str, config: Config) -> str:
    """Why an installed logger cannot be used, and what to do; '' if it can."""
    try:
        return _module(name).problem(config)
    # A broken installation may fail in any way.
    except Exception as error:
        return f"cannot be used ({type(error).__name__}: {error}); {_install(name, '--force-reinstall ')}"


def _install(name: str, options: str = "") -> str:
    return f'pip install {options}"{"stablelm" if name == TENSORBOARD else f"stablelm[{name}]"}"'


def open_loggers(config: Config, progress: Progress, warn: Callable[[str], None]) -> list[Sink]:
    """A sink for each logger, at work from now on; `warn` takes a line for the terminal, from any thread."""
    names = _named(config)
    if not names:
        return []
    info = run_info(config, progress)
    loggers: list[Sink] = []
    for name in names:
        # Imported by this thread: two threads that import at a time can meet half-imported modules.
        _module(name).load(config)
        known = run_id(info.directory, name) is not None
        if name == TENSORBOARD:
            loggers.append(Background(name, partial(_module(name).open_run, info), warn))
        else:
            opened = Background(name, partial(_with_history, name, info, known), warn)
            loggers.append(Once(opened, info, knows_the_run=known))
    return loggers


def _with_history(name: str, info: RunInfo, known: bool) -> Sink:
    """The logger's sink; one that is new to the run gets the figures of the steps before first."""
    sink = _module(name).open_run(info)
    for record in () if known else filter(None, map(figures, info.history())):
        sink.write(record)
    return sink


def where_curves_are(config: Config) -> list[str]:
    """A command for each logger that shows its curves."""
    return [_module(name).where(config.run.dir.rstrip("/")) for name in _named(config)]


def _named(config: Config) -> list[str]:
    return list(dict.fromkeys(config.observe.sinks))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"stablelm.observe.sinks.{name}_sink")
