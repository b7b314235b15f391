"""Why and when to stop early: signals, the time limit, a save that failed."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.engine.interface import StepResult
from stablelm.engine.ranks import Ranks

SAME_REQUEST_SECONDS = 2.0
LEAST_MARGIN_SECONDS = 5.0  # a save of a tenth of a second takes seconds when its disk or core is busy elsewhere
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REASONS = ("", "signal", "time limit", "failed save")


def deadline(limit: float | None, started: float, environ: Mapping[str, str] = os.environ) -> float | None:
    """When the run must have ended, seconds since 1970: `limit` seconds after `started` or at the end of the Slurm job.

    The earlier of the two counts; None if there is neither. An end in the past is another job's.
    """
    ends = [] if limit is None else [started + limit]
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal() and int(end) > started:
        ends.append(float(end))
    return min(ends, default=None)


class Stop:
    """Collects requests to stop on this rank; `StepExchange` makes them known to all."""

    def __init__(self, ranks: Ranks, *, deadline: float | None):
        self._ranks = ranks
        self._deadline = deadline
        self._request = 0
        self._first_signal: float | None = None
        self._at_once: Callable[[int], None] = lambda number: None
        # Seconds of what may still run before the last checkpoint is committed; the loop keeps them up to date.
        self.save_seconds = self.step_seconds = self.layers_seconds = self.batch_seconds = 0.0

    def listen(self, at_once: Callable[[int], None]) -> None:
        """Takes over SIGTERM, SIGINT, SIGHUP and SIGUSR1: the first asks for a checkpoint, a second ends the process.

        Launchers pass a terminal's Ctrl-C on to workers that already got it, so a repeat within
        `SAME_REQUEST_SECONDS` is the same request. `at_once` runs just before the process ends. Signals come to a
        process's main thread; in another one nothing is taken over.
        """
        self._at_once = at_once
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            # nohup has SIGHUP ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal, self._request = now, 1
            if self._ranks.is_first:
                name = signal.Signals(number).name
                os.write(2, f"{name}: saving a checkpoint, then ending; once more ends now\n".encode())
        elif now - self._first_signal > SAME_REQUEST_SECONDS:
            self._at_once(128 + number)
            os._exit(128 + number)

    def request(self, *, failed: bool = False) -> int:
        """This rank's request to stop, an index into `REASONS`; 0: none. It is never withdrawn.

        `failed`: a save in the background has failed, which the next save of all ranks will raise.
        """
        if failed:
            self._request = REASONS.index("failed save")
        elif not self._request and self._too_late():
            self._request = REASONS.index("time limit")
        return self._request

    @property
    def margin_seconds(self) -> float:
        """Seconds reserved for what cannot be cut short and for the last checkpoint.

        Other ranks learn of a request a step later, or a batch later inside an evaluation.
        """
        work = max(3 * self.step_seconds + self.layers_seconds, 3 * self.batch_seconds)
        return max(self.save_seconds + work, LEAST_MARGIN_SECONDS)

    def _too_late(self) -> bool:
        return self._deadline is not None and time.time() + self.margin_seconds >= self._deadline


class Outcome(NamedTuple):
    """A finished step: mean loss of all ranks (nats a token) and gradient norm; `data_step`: its batch, from 0."""

    step: int
    data_step: int
    loss: float
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class _Row:
    """A step's four numbers of this rank on their way to the host."""

    step: int
    data_step: int
    numbers: Tensor
    ready: torch.cuda.Event | None


class StepExchange:
    """Sums each step's requests to stop and its numbers over ranks on a gloo group of its own.

    A step's numbers leave a GPU by an asynchronous copy, are sent when the next step ends (on a CPU with their own)
    and are known to all ranks alike when the one after that ends.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._rows: deque[_Row] = deque()
        self._in_flight: tuple[dist.Work | None, Tensor, _Row | None] | None = None
        self._asked: tuple[dist.Work, Tensor] | None = None
        self.known = 0
        """The highest request to stop that all ranks know of."""

    def exchange(self, step: int, data_step: int, result: StepResult, request: int) -> tuple[int, list[Outcome]]:
        """The request that all ranks know of, and the steps whose numbers arrived. Call once a step, on every rank.

        A single process knows its own request at once; those of other ranks are known one step later.
        """
        self._rows.append(_row(step, data_step, result))
        late = 1 if self._rows[-1].ready is not None else 0
        agreed, outcomes = (request, []) if self._ranks.stop_group is None else self._collect()
        self._send(request, self._rows.popleft() if len(self._rows) > late else None)
        if self._ranks.stop_group is None:
            outcomes = self._collect()[1]
        self.known = max(self.known, agreed)
        return self.known, outcomes

    def ask(self, request: int) -> int:
        """Like `exchange` inside a step, without numbers: the request known to all ranks. Call on all ranks alike."""
        if self._ranks.stop_group is None:
            self.known = max(self.known, request)
            return self.known
        self._receive()
        sums = torch.tensor(_counts(request), dtype=torch.float64)
        work = dist.all_reduce(sums, group=self._ranks.stop_group, async_op=True)
        assert work is not None
        self._asked = work, sums
        return self.known

    def _receive(self) -> None:
        if self._asked is not None:
            work, sums = self._asked
            work.wait()
            self.known, self._asked = max(self.known, _highest(sums.tolist())), None

    def settle(self) -> list[Outcome]:
        """The steps whose numbers were still in flight, up to the last one; waits for them. On every rank."""
        self._receive()
        _, outcomes = self._collect()
        while self._rows:
            self._send(0, self._rows.popleft())
            outcomes += self._collect()[1]
        return outcomes

    def _send(self, request: int, row: _Row | None) -> None:
        if row is not None and row.ready is not None:
            row.ready.synchronize()  # of a step that is over, or nearly
        numbers = [0.0] * 4 if row is None else row.numbers.tolist()
        sums, work = torch.tensor([*_counts(request), *numbers], dtype=torch.float64), None
        if self._ranks.stop_group is not None:
            work = dist.all_reduce(sums, group=self._ranks.stop_group, async_op=True)
        self._in_flight = (work, sums, row)

    def _collect(self) -> tuple[int, list[Outcome]]:
        if self._in_flight is None:
            return 0, []
        work, sums, row = self._in_flight
        if work is not None:
            work.wait()
        self._in_flight = None
        *requests, cross_entropy, valid, norm, skipped = sums.tolist()
        request = _highest(requests)
        if row is None:
            return request, []
        ranks = self._ranks.world_size
        if skipped not in (0, ranks):
            raise RuntimeError(
                f"{skipped:.0f} of {ranks} ranks skipped the update of step {row.step}: their parameters differ now"
            )
        loss = cross_entropy / max(1.0, valid)
        return request, [Outcome(row.step, row.data_step, loss, norm / ranks, bool(skipped))]


def _counts(request: int) -> list[float]:
    return [float(request == kind) for kind in range(1, len(REASONS))]


def _highest(counts: list[float]) -> int:
    return max((kind for kind, count in enumerate(counts, 1) if count), default=0)


def _row(step: int, data_step: int, result: StepResult) -> _Row:
    values = (result.cross_entropy, result.valid, result.grad_norm, result.skipped)
    device = result.cross_entropy.device
    numbers = torch.stack([value.detach().to(device, torch.float64) for value in values])
    if device.type != "cuda":
        return _Row(step, data_step, numbers.cpu(), None)
    held = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
    held.copy_(numbers, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return _Row(step, data_step, held, ready)
