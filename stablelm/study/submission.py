"""Submits a study to Slurm: what is open as arrays of slurm/study.sh, then, when they have ended, what follows.

A wave is all that the agenda has open. After it a small job of one task submits the next wave by the same command, so
that rates and stages follow each other without anybody at the keyboard.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from stablelm.config.load import dump
from stablelm.errors import ConfigError
from stablelm.new_files import replace_file
from stablelm.study import results
from stablelm.study.agenda import agenda
from stablelm.study.cells import Cell, Run
from stablelm.study.collect import keep_finished, placed, run_dir
from stablelm.study.cost import on_gpus, with_engine
from stablelm.study.study_file import Study

SCRIPT = "slurm/study.sh"


def submit(study: Study, cells: Sequence[Cell], file: str, options: Sequence[str], say: Callable[[str], None]) -> int:
    """Collects what has finished and submits what is open; returns the number of runs. Raises ConfigError.

    `file`: the study's, for the job that goes on; `options`: of sbatch, for every array.
    """
    if not Path(SCRIPT).is_file():
        raise ConfigError(f"submit starts {SCRIPT}, which is not here; start it in a checkout of the repository")
    found = results.read_results(study.results_folder)
    states = agenda(study, cells, results.losses(found.values()))
    for run in (run for state in states for run in state.open):
        keep_finished(study, run, say)
    states = agenda(study, cells, results.losses(results.read_results(study.results_folder).values()))
    waves = _by_place(study, {run.id: run for state in states for run in state.open}.values())
    jobs = [_array(study, place, runs, options) for place, runs in waves.items()]
    if not jobs:
        say("nothing is open: every run has a result")
        return 0
    count = sum(map(len, waves.values()))
    say(f"submitted {count} runs as {'arrays' if len(jobs) > 1 else 'array'} {', '.join(jobs)}")
    say(f"job {_follower(study, file, jobs, options)} submits what follows")
    return count


class Placed(NamedTuple):
    """Where a run is to run: on so many GPUs by an engine, or with 0 as one process on a CPU."""

    ranks: int
    kind: str


def _by_place(study: Study, runs: Collection[Run]) -> dict[Placed, list[Run]]:
    found: dict[Placed, list[Run]] = {}
    places: dict[str, Placed] = {}
    for run in runs:
        if run.cell.name not in places:
            cost = on_gpus(study, run.cell) if study.resources.gpu else None
            places[run.cell.name] = Placed(cost.gpus, cost.kind) if cost else Placed(0, "")
        found.setdefault(places[run.cell.name], []).append(run)
    return found


def _array(study: Study, place: Placed, runs: list[Run], options: Sequence[str]) -> str:
    """Submits runs of one place; the array's job number."""
    lines = []
    for run in runs:
        folder = run_dir(study, run)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file, config = folder.with_suffix(".yaml"), placed(study, run)
        replace_file(file, dump(with_engine(config, place.kind) if place.ranks else config))
        lines.append(shlex.quote(str(file)))
    listed = study.folder / f"{study.study}-{place.kind or 'cpu'}-{place.ranks or 1}.txt"
    replace_file(listed, "\n".join(lines) + "\n")
    environment = {**os.environ, "STABLELM_AT_ONCE": str(study.limits.jobs)}
    return _answer([SCRIPT, str(listed), *_resources(study, place.ranks), *options], environment)


def _resources(study: Study, ranks: int) -> list[str]:
    if not ranks:
        return ["--ntasks=1"]
    each = min(ranks, study.resources.gpus_per_node)
    return [f"--nodes={ranks // each}", f"--ntasks-per-node={each}", f"--gpus-per-node={each}"]


def _follower(study: Study, file: str, jobs: Sequence[str], options: Sequence[str]) -> str:
    """Submits the job that submits what comes next, on one task of the same partition and account."""
    program = [sys.executable, "launch/study.py", "submit", "--study", file, "--jobs", str(study.limits.jobs)]
    again = shlex.join([*program, *(["--", *options] if options else [])])
    place = [option for option in options if option.split("=")[0] in ("--partition", "-p", "--account", "-A", "--qos")]
    return _answer([
        "sbatch", "--parsable", f"--job-name={study.study}-next", f"--output={study.folder}/next-%j.out", "--ntasks=1",
        f"--dependency=afterany:{':'.join(jobs)}", *place, f"--wrap={again}",
    ])  # fmt: skip


def _answer(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """A command's last line, a job number. Raises ConfigError with what it says."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"{command[0]} cannot be started: {error.strerror}; submit where Slurm's commands are"
        ) from None
    if done.returncode:
        raise ConfigError(f"{command[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]
