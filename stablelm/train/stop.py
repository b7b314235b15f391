"""Why and when to stop early: signals, the time limit, a save that failed."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from stablelm.engine.ranks import Ranks

SAME_REQUEST_SECONDS = 2.0
LEAST_MARGIN_SECONDS = 5.0  # a save of a tenth of a second takes seconds when its disk or core is busy elsewhere
REASONS = ("", "signal", "time limit", "failed save")


def deadline(limit: float | None, started: float, environ: Mapping[str, str] = os.environ) -> float | None:
    """When the run must have ended, seconds since 1970: `limit` seconds after `started` or at the end of the Slurm job.

    The earlier of the two counts; None if there is neither. A job's end that is over already is another job's.
    """
    ends = [] if limit is None else [started + limit]
    told = environ.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal() and int(told) > started:
        ends.append(float(told))
    return min(ends, default=None)


class Stop:
    """Collects wishes to stop on this rank; `train.agreement` makes them known to all."""

    def __init__(self, ranks: Ranks, *, deadline: float | None):
        self._ranks = ranks
        self._deadline = deadline
        self._wish = 0
        self._first_signal: float | None = None
        self._at_once: Callable[[int], None] = lambda number: None
        # What may still have to end before the last checkpoint is committed; the loop keeps them up to date.
        self.save_seconds = self.step_seconds = self.layers_seconds = self.batch_seconds = 0.0

    def listen(self, at_once: Callable[[int], None]) -> None:
        """Takes over SIGTERM, SIGINT, SIGHUP and SIGUSR1: the first asks for a checkpoint, a second ends the process.

        Launchers pass a terminal's Ctrl-C on to workers that already got it, so a repeat within
        `SAME_REQUEST_SECONDS` is the same request. `at_once` runs just before the process ends.
        """
        self._at_once = at_once
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # nohup has SIGHUP ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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

    def wish(self, *, failed: bool = False) -> int:
        """This rank's wish to stop, a place in `REASONS`; 0: none. It stays.

        `failed`: a save in the background has failed, which the next save of all ranks will raise.
        """
        if failed:
            self._wish = REASONS.index("failed save")
        elif not self._wish and self._too_late():
            self._wish = REASONS.index("time limit")
        return self._wish

    @property
    def margin_seconds(self) -> float:
        """Time to keep for what cannot be cut short and the last checkpoint.

        Other ranks hear of a wish a step later, or a batch later inside an evaluation.
        """
        work = max(3 * self.step_seconds + self.layers_seconds, 3 * self.batch_seconds)
        return max(self.save_seconds + work, LEAST_MARGIN_SECONDS)

    def _too_late(self) -> bool:
        return self._deadline is not None and time.time() + self.margin_seconds >= self._deadline
