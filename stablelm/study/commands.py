"""What the actions of `stablelm study` do; each returns an exit code and raises UserError."""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stablelm.errors import ConfigError, StorageError
from stablelm.study import results
from stablelm.study.cells import Cell, cells_of
from stablelm.study.cost import Cost, by_flops, here, on_gpus
from stablelm.study.runner import Runner, TrainingRunner, claimed
from stablelm.study.status import doubles, expansion, progress
from stablelm.study.study_file import COORDINATES, Limits, Study, read_study

if TYPE_CHECKING:
    from stablelm.study.report.writer import ReportContents


def checked(arguments: argparse.Namespace) -> tuple[Study, list[Cell]]:
    """The study and its cells, with what the command line says in place of the file. Raises ConfigError."""
    study = read_study(arguments.study)
    given = {name: value for name in ("jobs", "hours") if (value := getattr(arguments, name, None)) is not None}
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"--{name} {value:g} must be above 0")
    study = replace(study, limits=Limits(**(vars(study.limits) | given)))
    # What a study on a cluster costs can be seen where its text is not.
    return study, cells_of(study, look=arguments.action != "expand" or study.resources.gpu is None)


def expand(arguments: argparse.Namespace) -> int:
    study, cells = checked(arguments)
    found = {} if study.kind == COORDINATES else results.read_results(study.results_folder)

    def cost(cell: Cell) -> Cost:
        if study.resources.gpu is None:
            return here(cell, found.values())
        return on_gpus(study, cell) if arguments.fit else by_flops(study, cell)

    print(expansion(study, cells, found, cost))
    return 0


def run(arguments: argparse.Namespace) -> int:
    study, cells = checked(arguments)
    for names in doubles(study, cells):
        print(f"note: {names} have the same identity and share their runs", file=sys.stderr)
    with claimed(study) as lock:
        return _runner(study)(study, cells, lock, lambda line: print(line, flush=True)).run()


def _runner(study: Study) -> type[Runner]:
    if study.kind == COORDINATES:
        from stablelm.study.coordinates import SizesRunner

        return SizesRunner
    return TrainingRunner


def submit(arguments: argparse.Namespace) -> int:
    study, cells = checked(arguments)
    if study.kind == COORDINATES:
        raise ConfigError(f"kind={COORDINATES} makes ten steps a model and has no jobs to submit; use `run`")
    from stablelm.study.submission import submit as submit_open

    with claimed(study):
        submit_open(study, cells, arguments.study, arguments.options, lambda line: print(line, flush=True))
    return 0


def status(arguments: argparse.Namespace) -> int:
    study, cells = checked(arguments)
    while True:
        words = _progress(study, cells)
        if arguments.every is None or not sys.stdout.isatty():
            print(words)
            return 0
        print(f"\x1b[H\x1b[2J{words}", flush=True)
        time.sleep(arguments.every)


def _progress(study: Study, cells: list[Cell]) -> str:
    if study.kind == COORDINATES:
        from stablelm.study.coordinates import progress as measured

        return measured(study, cells)
    return progress(study, cells, results.read_results(study.results_folder))


def report(arguments: argparse.Namespace) -> int:
    study, cells = checked(arguments)
    from stablelm.new_files import replace_file
    from stablelm.study.report.writer import write_report

    folder = Path(arguments.out) if arguments.out else study.folder / "report"
    try:
        made, records = _contents(study, cells)
        page = write_report(made, folder)
        if arguments.records:
            replace_file(Path(arguments.records), records)
    except OSError as error:
        raise StorageError(f"the report cannot be written to {folder}", error.strerror or error) from error
    print(f"written: {page}")
    return 0


def _contents(study: Study, cells: list[Cell]) -> "tuple[ReportContents, str]":
    """What a report says, and the study's records as lines: a coordinate check has none."""
    if study.kind == COORDINATES:
        from stablelm.study.report.coordinates import contents

        return contents(study, cells), ""
    from stablelm.study.baselines import bigram_losses
    from stablelm.study.records import as_lines, records_of
    from stablelm.study.report.findings import findings
    from stablelm.study.report.writer import contents_of

    found = results.read_results(study.results_folder)
    made = findings(study, cells, found, bigram_losses(study, cells, partial(print, file=sys.stderr)))
    return contents_of(made), as_lines(records_of(made))
