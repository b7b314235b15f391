"""What all ranks learn alike of each step, one small sum over ranks a step, and no step waits for it."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.engine.ranks import Ranks
from stablelm.train.step import StepResult

WISHES = 3
"""Kinds of wishes to stop, numbered from 1; among several the highest counts."""


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


class Agreement:
    """Sums each step's wishes and numbers over ranks on a gloo group of its own.

    A step's numbers leave a GPU by an asynchronous copy, are sent when the next step ends (on a CPU with their own)
    and are known to all ranks alike when the one after that ends.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._rows: deque[_Row] = deque()
        self._under_way: tuple[dist.Work | None, Tensor, _Row | None] | None = None
        self._asked: tuple[dist.Work, Tensor] | None = None
        self.known = 0
        """The highest wish that all ranks know of."""

    def exchange(self, step: int, data_step: int, result: StepResult, wish: int) -> tuple[int, list[Outcome]]:
        """The wish that all ranks know of, and the steps whose numbers came in. Call once a step, on every rank.

        Alone, a process knows its own wish at once; of others it is known one step later.
        """
        self._rows.append(_row(step, data_step, result))
        late = 1 if self._rows[-1].ready is not None else 0
        agreed, outcomes = (wish, []) if self._ranks.stop_group is None else self._collect()
        self._send(wish, self._rows.popleft() if len(self._rows) > late else None)
        if self._ranks.stop_group is None:
            outcomes = self._collect()[1]
        self.known = max(self.known, agreed)
        return self.known, outcomes

    def ask(self, wish: int) -> int:
        """The wish that all ranks know of, inside a step, those of others a call later. Call on all ranks alike."""
        if self._ranks.stop_group is None:
            self.known = max(self.known, wish)
            return self.known
        self._hear()
        sums = torch.tensor(_counts(wish), dtype=torch.float64)
        work = dist.all_reduce(sums, group=self._ranks.stop_group, async_op=True)
        assert work is not None
        self._asked = work, sums
        return self.known

    def _hear(self) -> None:
        if self._asked is not None:
            work, sums = self._asked
            work.wait()
            self.known, self._asked = max(self.known, _highest(sums.tolist())), None

    def settle(self) -> list[Outcome]:
        """The steps whose numbers were still under way, up to the last one; waits for them. On every rank."""
        self._hear()
        _, outcomes = self._collect()
        while self._rows:
            self._send(0, self._rows.popleft())
            outcomes += self._collect()[1]
        return outcomes

    def _send(self, wish: int, row: _Row | None) -> None:
        if row is not None and row.ready is not None:
            row.ready.synchronize()  # of a step that is over, or nearly
        numbers = [0.0] * 4 if row is None else row.numbers.tolist()
        sums, work = torch.tensor([*_counts(wish), *numbers], dtype=torch.float64), None
        if self._ranks.stop_group is not None:
            work = dist.all_reduce(sums, group=self._ranks.stop_group, async_op=True)
        self._under_way = (work, sums, row)

    def _collect(self) -> tuple[int, list[Outcome]]:
        if self._under_way is None:
            return 0, []
        work, sums, row = self._under_way
        if work is not None:
            work.wait()
        self._under_way = None
        *wishes, cross_entropy, valid, norm, skipped = sums.tolist()
        wish = _highest(wishes)
        if row is None:
            return wish, []
        ranks = self._ranks.world_size
        if skipped not in (0, ranks):
            raise RuntimeError(
                f"{skipped:.0f} of {ranks} ranks left out the update of step {row.step}: they differ now"
            )
        loss = cross_entropy / max(1.0, valid)
        return wish, [Outcome(row.step, row.data_step, loss, norm / ranks, bool(skipped))]


def _counts(wish: int) -> list[float]:
    return [float(wish == kind) for kind in range(1, WISHES + 1)]


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
