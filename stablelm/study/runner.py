"""Runs a study on this machine: each run a process of one thread, as many at once as asked for."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stablelm.config.load import dump
from stablelm.errors import EXIT_FINISHED, EXIT_STOPPED_EARLY, ConfigError
from stablelm.new_files import replace_file
from stablelm.study import results
from stablelm.study.agenda import agenda
from stablelm.study.cells import Cell, Run
from stablelm.study.collect import FINISHED, is_finished, keep_finished, measures_file, placed, run_dir
from stablelm.study.study_file import Study
from stablelm.supervise.attempts import read_summary

POLL_SECONDS = 0.2
DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
OWNER = "study"


@contextmanager
def claimed(study: Study) -> Iterator[int]:
    """The study's folder is this process's alone; runs inherit the descriptor, so that an orphan keeps the claim.

    Raises ConfigError where the folder is in use, or is another study's.
    """
    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own = folder / OWNER
        if own.exists() and (other := own.read_text().strip()) != study.study:
            raise ConfigError(f"{folder} holds the runs of another study, {other}; give this one another name")
        own.write_text(study.study + "\n")
        yield lock
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is in use by another start of this study, or by a run that one left; wait"
        ) from None
    finally:
        os.close(lock)


class Runner:
    """Starts what is open, process after process, and keeps the results of what has finished."""

    def __init__(self, study: Study, cells: list[Cell], lock: int, say: Callable[[str], None] = print):
        """`lock`: what `claimed` gives."""
        self._study, self._cells, self._lock, self._say = study, cells, lock, say
        self._running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        self._failed: dict[str, Run] = {}
        self._stopping = False
        hours = study.limits.hours
        self._deadline = time.monotonic() + hours * 3600 if hours is not None else float("inf")
        self._kept = 0

    def _open(self) -> list[Run]:
        """What has no result yet and waits for none."""
        raise NotImplementedError

    def _next(self, run: Run) -> tuple[str, ...]:
        """Module and arguments of a run's next process; () where it has finished."""
        raise NotImplementedError

    def _keep(self, run: Run) -> None:
        """Writes the result of a run that has finished."""
        raise NotImplementedError

    def run(self) -> int:
        """The exit code: 0 all done, 75 stopped early, 1 where runs failed."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop("a signal"))
        signal.signal(signal.SIGINT, lambda *_: self._stop("a signal"))
        while True:
            if time.monotonic() > self._deadline:
                self._stop(f"limits.hours={self._study.limits.hours:g}")
            kept = self._kept
            self._start()
            if self._running:
                self._wait()
            elif self._kept == kept:
                break
        if self._stopping:
            return EXIT_STOPPED_EARLY
        for run in self._failed.values():
            self._say(f"failed: {run}, see {self._log(run)}")
        return 1 if self._failed else EXIT_FINISHED

    def _start(self) -> None:
        """As many of the open runs as there is room for."""
        if self._stopping or len(self._running) >= self._study.limits.jobs:
            return
        for run in self._open():
            if len(self._running) >= self._study.limits.jobs:
                return
            if run.id not in self._running and run.id not in self._failed:
                self._go_on(run)

    def _go_on(self, run: Run) -> None:
        """Starts a run's next process; with nothing left to start, its result is kept."""
        if module := self._next(run):
            self._running[run.id] = run, self._process(run, *module)
        else:
            self._keep(run)
            self._kept += 1

    def _configuration(self, run: Run) -> Path:
        """The run's file, written."""
        file = run_dir(self._study, run).with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, dump(placed(self._study, run)))
        return file

    def _process(self, run: Run, *module: str) -> subprocess.Popen[bytes]:
        with open(self._log(run), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[self._lock],
                preexec_fn=_end_with_parent,
            )

    def _log(self, run: Run) -> Path:
        return run_dir(self._study, run).with_suffix(".log")

    def _wait(self) -> None:
        """Until one of the runs has ended."""
        while not any(process.poll() is not None for _, process in self._running.values()):
            if time.monotonic() > self._deadline:
                self._stop(f"limits.hours={self._study.limits.hours:g}")
            time.sleep(POLL_SECONDS)
        for key, (run, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[key]
                self._ended(run, process.returncode)

    def _ended(self, run: Run, code: int) -> None:
        if self._stopping:
            return
        if code in FINISHED:
            self._go_on(run)
        else:
            self._failed[run.id] = run
            self._say(f"{run}: exit code {code}, see {self._log(run)}")

    def _stop(self, why: str) -> None:
        """Asks the runs to save and end; none is started any more."""
        if self._stopping:
            return
        self._stopping = True
        self._say(f"stopped by {why}; the same command continues")
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)


class TrainingRunner(Runner):
    """Trains what the agenda has open, and measures the runs of the comparison."""

    def __init__(self, study: Study, cells: list[Cell], lock: int, say: Callable[[str], None] = print):
        super().__init__(study, cells, lock, say)
        self._results = results.read_results(study.results_folder)

    def _open(self) -> list[Run]:
        states = agenda(self._study, self._cells, results.losses(self._results.values()))
        return [run for state in states for run in state.open]

    def _next(self, run: Run) -> tuple[str, ...]:
        if not is_finished(self._study, run):
            return "stablelm", "pretrain", "--config", str(self._configuration(run))
        if self._to_measure(run):
            return "stablelm.study.measure", str(self._configuration(run)), str(measures_file(self._study, run))
        return ()

    def _to_measure(self, run: Run) -> bool:
        """Runs of the comparison are measured, unless they diverged."""
        code = read_summary(run_dir(self._study, run))["exit_code"]
        return (
            run.seed in self._study.seeds.confirm
            and code == EXIT_FINISHED
            and not measures_file(self._study, run).exists()
        )

    def _keep(self, run: Run) -> None:
        result = keep_finished(self._study, run, self._say)
        assert result is not None
        self._results[run.id] = result


def _end_with_parent() -> None:
    """A run is asked to stop when the process that started it dies, however that happens."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)
