"""Studies of kind coordinates: how large features are after each of the first steps, in every model of the grid.

A model is measured by `python -m stablelm.study.coordinates CONFIG_FILE OUT.json`.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from stablelm.config.load import load
from stablelm.json_text import Number
from stablelm.new_files import replace_file
from stablelm.observe.provenance import REPOSITORY, git_state
from stablelm.probe.prober import prepare
from stablelm.study.cells import Cell, Run
from stablelm.study.collect import asked, origin, run_dir
from stablelm.study.results import Sealed, finite, read_sealed, write_result
from stablelm.study.runner import Runner
from stablelm.study.study_file import Study


class Sizes(Sealed):
    """A measured model. `figures`: those of `probe.coordinates.FIGURES` after each step from 0; None: not finite."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    figures: list[list[Number | None]]


def read_sizes(folder: Path) -> dict[str, Sizes]:
    """By id. Raises ConfigError."""
    return read_sealed(folder, Sizes)


def runs_of(study: Study, cells: Sequence[Cell]) -> list[Run]:
    assert study.lr.fixed is not None
    return [Run(cell, study.lr.fixed[0], study.seeds.tune[0]) for cell in cells]


def progress(study: Study, cells: Sequence[Cell]) -> str:
    """How far it is, in a line."""
    runs, known = runs_of(study, cells), read_sizes(study.results_folder)
    return f"{sum(run.id in known for run in runs)} of {len(runs)} models are measured"


class SizesRunner(Runner):
    """Measures every model that has no result yet."""

    def __init__(self, study: Study, cells: list[Cell], lock: int, say: Callable[[str], None] = print):
        super().__init__(study, cells, lock, say)
        self._done = set(read_sizes(study.results_folder))

    def _open(self) -> list[Run]:
        # The largest first: else one of them would run alone at the end.
        waiting = [run for run in runs_of(self._study, self._cells) if run.id not in self._done]
        return sorted(waiting, key=lambda run: run.cell.flops, reverse=True)

    def _out(self, run: Run) -> Path:
        return run_dir(self._study, run).with_suffix(".json")

    def _next(self, run: Run) -> tuple[str, ...]:
        if self._out(run).exists():
            return ()
        return "stablelm.study.coordinates", str(self._configuration(run)), str(self._out(run))

    def _keep(self, run: Run) -> None:
        found = json.loads(self._out(run).read_text())
        write_result(self._study.results_folder, _result(self._study, run, found))
        self._done.add(run.id)
        self._say(f"{run.cell.name} {run.cell.shape}: {found['seconds']:.0f} s")


def _result(study: Study, run: Run, found: dict[str, Any]) -> dict[str, Any]:
    return {
        **asked(study, run),
        "figures": [[finite(value, 8) for value in row] for row in found["figures"]],
        "seconds": found["seconds"],
        "provenance": {"commit": found["commit"], "changed": found["changed"], **origin(run)},
    }


def measure(config_file: str) -> dict[str, Any]:
    """Figures of the model of a configuration file on its first batch, and the seconds that took."""
    from stablelm.probe.coordinates import figures_of
    from stablelm.train.job import first_rows

    loaded = load([config_file], [])
    rows, seq_len = loaded.config.train.batch_sizes.largest, loaded.config.data.seq_len
    request = prepare(loaded, None, rows, seq_len)
    batch = first_rows(request.prepared, rows, seq_len)
    started = time.monotonic()
    figures = figures_of(request.config, *batch)
    commit, diff = git_state(REPOSITORY)
    seconds = round(time.monotonic() - started, 1)
    return {"figures": figures, "seconds": seconds, "commit": commit, "changed": bool(diff)}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    replace_file(Path(sys.argv[2]), json.dumps(measure(sys.argv[1])) + "\n")
