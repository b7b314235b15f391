"""Arguments of every program: a mistake in them is a bad configuration (torch-free)."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stablelm.command_names import typed
from stablelm.errors import ConfigError, UserError
from stablelm.paths import expand

KEYS = "overrides"
"""Destination of positional arguments that are keys of a configuration."""


def path_or_url(text: str) -> str:
    """Type of an argument that is a path or URL: `~` is the home directory, `$` is refused."""
    try:
        return expand(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """Type of an argument that is a path of this machine."""
    return Path(path_or_url(text))


def named_path(text: str) -> str:
    """Type of an argument `[NAME=]PATH`."""
    name, given = re.fullmatch(r"([\w-]+=)?(.*)", text, re.ASCII | re.DOTALL).groups("")  # type: ignore[union-attr]
    return name + path_or_url(given)


def named_paths(text: str) -> str:
    """Type of an argument `[NAME=]PATH,...`."""
    return ",".join(map(named_path, text.split(",")))


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that a program uses, as `checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_or_url,
        metavar="DIR",
        help="a run (its newest valid checkpoint) or a step directory",
    )


def add_average(parser: argparse.ArgumentParser) -> None:
    """Which weights of a checkpoint, as `average`."""
    parser.add_argument(
        "--average",
        metavar="WHICH",
        help="none: the trained weights; ema: their moving average; last:K: the mean of the newest K checkpoints; "
        "default: the run's evaluate.average",
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the programs that read text: where it is, and how it is read."""
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        type=path_or_url,
        help="files, globs, folders, URLs, hf:// patterns or 'embedded'",
    )
    parser.add_argument("--text-column", default="text", help="key or column that holds the text; default: text")
    parser.add_argument(
        "--bad-rows", choices=["stop", "skip"], default="stop", help="a row without a document; default: stop"
    )
    parser.add_argument(
        "--text-unit", choices=["file", "line"], default="file", help="a document in *.txt files; default: file"
    )
    parser.add_argument(
        "--cache", default="data/cache", type=path_or_url, help="folder of the embedded corpus; default: data/cache"
    )


def run(work: Callable[[], None]) -> int:
    """Does a program's work and returns its exit code; a `UserError` is printed as one sentence."""
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def refuse_several_processes(command: str) -> int | None:
    """The exit code, after a sentence, where a launcher started a program several times that runs in one process."""
    from stablelm.engine.launch_environment import Launch, detect
    from stablelm.process_exit import report

    launch = Launch()
    try:
        launch = detect()
        if launch.world_size == 1:
            return None
        raise ConfigError(
            f"{command} runs in one process, and {launch.launcher} started {launch.world_size}; start it by "
            f"{typed(command)}"
        )
    except ConfigError as error:
        report(error, launch.rank)
        return error.exit_code


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The files and single keys of a run's configuration, as `config` and `overrides`."""
    parser.add_argument(
        "--config", action="append", default=[], type=path_or_url, metavar="FILE", help="YAML file; later ones win"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="single keys; these win over files")


class Parser(argparse.ArgumentParser):
    """Ends with the exit code of a bad configuration, and names the nearest option or command."""

    # Pyright compares with overloads by the type of the namespace, which no program here uses.
    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, unknown = self.parse_known_args(args, namespace)
        return self._all_known(found, unknown)

    def parse_intermixed_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        found, unknown = self.parse_known_intermixed_args(args, namespace)
        return self._all_known(found, unknown)

    def error(self, message: str) -> Any:
        # Every rank gets the same arguments: one of them tells.
        first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        self.exit(ConfigError.exit_code, f"error: {message}; see {self.prog} --help\n" if first else None)

    def _all_known(self, found: argparse.Namespace, unknown: list[str]) -> argparse.Namespace:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if options:
            self.error("; ".join(f"unknown option {option}{self._hint(option, found)}" for option in options))
        if unknown:
            self.error(f"unexpected argument{'s' * (len(unknown) > 1)} {' '.join(unknown)}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = _nearest(str(value), choices)
        what = "/".join(action.option_strings) or action.dest
        self.error(f"unknown {what} {value}{f', did you mean {near}?' if near else ''} (one of {', '.join(choices)})")

    def _hint(self, option: str, found: argparse.Namespace) -> str:
        name = option.lstrip("-").replace("-", "_")
        if any(action.dest == KEYS for action in self._actions):
            from stablelm.config.hints import nearest  # not needed where all is right

            key = nearest(name)
            if key is not None and ("." in name or key.endswith(f".{name}")):
                return f", did you mean {key}=...? keys are written without dashes"
        near = _nearest(option, self._options(found))
        return f", did you mean {near}?" if near else ""

    def _options(self, found: argparse.Namespace) -> list[str]:
        """Options of this parser, and of the command that was chosen."""
        options = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(found, action.dest, ""))
                options += chosen._options(found) if chosen else []
        return options


def _nearest(word: str, words: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)
