"""Why and when to stop early: signals, the time limit, `run.stop_after`; agreed by all ranks."""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from stablelm.engine.mesh import Ranks

SAME_REQUEST_SECONDS = 2.0
LEAST_MARGIN_SECONDS = 5.0  # a save of a tenth of a second takes seconds when its disk or core is busy elsewhere
REASONS = ("", "signal", "time limit", "failed save")


class Stop:
    """Collects wishes to stop on any rank; all ranks learn of one at the same step.

    Each step starts an all-reduce of the wish on its own gloo group and reads the previous step's
    result, so that no step waits for another rank.
    """

    def __init__(self, ranks: Ranks, *, deadline: float | None):
        self._ranks = ranks
        self._deadline = deadline
        self._wish = 0
        self._first_signal: float | None = None
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self._at_once: Callable[[int], None] = lambda number: None
        self.margin_seconds = 0.0
        """Time to keep for the last checkpoint; the loop raises it to what saves and steps really take."""

    def listen(self, at_once: Callable[[int], None]) -> None:
        """Takes over SIGTERM, SIGINT and SIGUSR1: the first asks for a checkpoint, a second ends the process.

        Launchers pass a terminal's Ctrl-C on to workers that already got it, so a repeat within
        `SAME_REQUEST_SECONDS` is the same request. `at_once` runs just before the process ends.
        """
        self._at_once = at_once
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal, self._wish = now, 1
            if self._ranks.is_first:
                name = signal.Signals(number).name
                os.write(
                    sys.stderr.fileno(), f"{name}: saving a checkpoint, then ending; once more ends now\n".encode()
                )
        elif now - self._first_signal > SAME_REQUEST_SECONDS:
            self._at_once(128 + number)
            os._exit(128 + number)

    def agreed(self, *, failed: bool = False) -> str:
        """The reason to stop after this step, or ''. Call once a step, on every rank.

        `failed`: a save in the background has failed, which the next save of all ranks will raise.
        """
        if failed:
            self._wish = REASONS.index("failed save")
        elif not self._wish and self._too_late():
            self._wish = 2
        if self._ranks.stop_group is None:
            return REASONS[self._wish]
        reason = self._collect()
        flag = torch.tensor([self._wish], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._ranks.stop_group, async_op=True)
        self._pending = (work, flag)
        return reason

    def _too_late(self) -> bool:
        margin = max(self.margin_seconds, LEAST_MARGIN_SECONDS)
        return self._deadline is not None and time.time() + margin >= self._deadline

    def finish(self) -> str:
        """Waits for the exchange that is still under way; the loop's last call."""
        return self._collect()

    def _collect(self) -> str:
        if self._pending is None:
            return ""
        work, flag = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        return REASONS[int(flag)]
