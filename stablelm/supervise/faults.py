"""Faults on purpose (`faults.*`), which test the guards; without them nothing here acts."""

import math
import resource
import time
from pathlib import Path

from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.checkpoint.selection import step_directories
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks

LARGEST_FILE = 2**16  # bytes; on the "full" disk summaries still fit, tensors do not


class Faults:
    """The faults of one attempt on one rank. Those that end an attempt apply to the first one alone."""

    def __init__(self, config: Config, ranks: Ranks, attempt: int):
        self._faults, self._ranks, self._first = config.faults, ranks, attempt == 1
        self._root = checkpoint_path(str(config.checkpoint.dir))

    def loss_factor(self, data_step: int) -> float:
        """The factor of the loss of batch `data_step` (from 0): 1 for all but the bad one."""
        if self._faults.bad_batch is None or data_step + 1 != self._faults.bad_batch:
            return 1.0
        return math.nan if self._faults.spike is None else self._faults.spike

    def before(self, step: int) -> None:
        """Sleeps, hangs or raises, if configured for this step and rank."""
        slow, here = self._faults.slow, (self._ranks.rank, step)
        if slow is not None and slow[0] == self._ranks.rank:
            time.sleep(slow[1])
        if self._first and self._faults.crash == here:
            raise RuntimeError(f"faults.crash={list(here)}")
        self.hang(step, "step")

    def hang(self, step: int, phase: str) -> None:
        """Never returns, where this rank is meant to hang in this phase of the step."""
        while (
            self._first and self._faults.hang == (self._ranks.rank, step) and (self._faults.hang_in or "step") == phase
        ):
            time.sleep(0.1)

    def saving(self, step: int) -> None:
        """Before the save of a step: hangs, or limits the size of files from now on, if configured for it."""
        self.hang(step, "save")
        if self._first and self._faults.full_disk == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))

    def saved(self, step: int) -> None:
        """After the commit of a step: flips one bit of its largest file, if configured for this step."""
        if self._first and self._faults.corrupt_save == step and self._ranks.is_first:
            for directory in step_directories(self._root):
                if directory.name.endswith(f"{step:08d}"):
                    _flip(directory)


def _flip(directory: CheckpointPath) -> None:
    assert isinstance(directory, Path)
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
