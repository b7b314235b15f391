"""Saves of one attempt: copied to host memory while the loop waits, written and committed while it continues.

One save is in flight at most; the next one, a stop and the end of the run wait for it. The thread that writes talks to
the other ranks through a group of its own, so that its collectives never meet those of the loop. All its phases fail on
all ranks together, so every rank finds the same failure when it next waits, which all ranks do at the same step.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stablelm.checkpoint import commit
from stablelm.checkpoint.fence import Fence
from stablelm.engine.consensus import Consensus
from stablelm.engine.tensor_parts import FlatShard, part_of


class Saver:
    """Commits steps below `fence.root`; collective over `group` (gloo, used by nothing else; None: one process).

    `shapes` is what each save must hold (see `commit.save`). `committed` is called with the step after each commit,
    `retain` once on rank 0 after that, `reached` with each part of a save that this rank has finished; all of them in
    the background.
    """

    def __init__(
        self,
        fence: Fence,
        group: dist.ProcessGroup | None,
        *,
        shapes: Mapping[str, torch.Size],
        background: bool,
        committed: Callable[[int], None] = lambda step: None,
        retain: Callable[[], Any] = lambda: None,
        reached: Callable[[str], None] = lambda part: None,
    ):
        self.fence, self.background, self._shapes = fence, background, shapes
        self.seconds = 0.0
        """Duration of the last save, from the copy to the commit; before the first one, the dry run's estimate."""
        self._group, self._committed, self._retain, self._reached = group, committed, retain, reached
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, which `wait` will raise."""
        return self._failure is not None

    @property
    def margin_seconds(self) -> float:
        """What a stop should leave for saving: the save in flight and its own, and as much as one in reserve."""
        return (3 if self.background else 2) * self.seconds

    def dry_run(self, tensors: dict[str, torch.Tensor]) -> commit.SaveResult:
        """See `commit.dry_run`, here and now; also takes the host memory that saves will need."""
        started = time.perf_counter()
        held = self._host.copy(tensors) if self.background else tensors
        copying = time.perf_counter() - started
        result = commit.dry_run(self.fence, held, group=self._group, reached=self._reached)
        self.seconds = copying + result.seconds
        return result

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], config_yaml: str, *, wait: bool
    ) -> None:
        """Waits for the save in flight, then saves as `commit.save` does; returns before the commit unless `wait`.

        Raises what either failed with.
        """
        self.wait()
        started = time.perf_counter()
        if wait or not self.background:
            self._commit(step, tensors, state, config_yaml, started)
            return
        held = self._host.copy(tensors)

        def work() -> None:
            try:
                self._commit(step, held, state, config_yaml, started)
            except BaseException as error:  # raised by wait
                self._failure = error

        self._thread = threading.Thread(target=work, name=f"save of step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once nothing is in flight. Raises what the save in flight failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def settle(self) -> None:
        """After a failure elsewhere: lets a save in flight come to its end if that needs no other rank."""
        if self._thread is not None and self._group is None:
            self._thread.join()

    def _commit(self, step: int, tensors: dict[str, torch.Tensor], state: dict, config_yaml: str, started: float):
        def reached(part: str) -> None:
            self._reached(f"step {step}, save ({part})")

        group = self._group
        commit.save(self.fence, step, tensors, state, config_yaml, shapes=self._shapes, group=group, reached=reached)
        self._committed(step)
        rank = 0 if group is None else dist.get_rank(group)
        Consensus(group, rank, reached).first(self._retain, "retention")
        self.seconds = time.perf_counter() - started


class HostCopy:
    """A copy of tensors in host memory, page-locked where they come from a GPU, made once and filled again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Equal tensors that share nothing with the given ones, FlatShards for DTensors; overwrites the last copy."""
        held, on_gpu = {}, False
        for name, tensor in tensors.items():
            part = part_of(tensor, 0, 1)
            local = part.local
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            on_gpu |= local.is_cuda
            # A DTensor's mesh may be of GPUs; the place in the whole is what a save needs.
            cut = isinstance(tensor, FlatShard | DTensor)
            place = {"copies": part.copies, "copy": part.copy}
            held[name] = FlatShard(buffer.view(-1), part.shape, part.start, **place) if cut else buffer
        if on_gpu:
            torch.cuda.synchronize()
        return held
