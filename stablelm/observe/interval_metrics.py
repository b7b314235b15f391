"""From steps to records: sums of the current interval, one reduction over ranks and one host sync a record."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.config.schema import Config
from stablelm.data.storage.stall_monitor import waited_seconds
from stablelm.engine.interface import StepResult
from stablelm.engine.ranks import Ranks
from stablelm.methods.sizes import flops_per_token
from stablelm.observe.accelerators import named_by
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import Records

NOTICEABLE = 0.1
"""Share of a step that the slowest rank must lie behind the median rank to be named."""


class DataCounts(Protocol):
    """What a loader reports of its text: how often each source was read, and counts since the last call."""

    def epochs(self) -> dict[str, float]: ...

    def counts(self) -> dict[str, int]: ...


MANY_UNKNOWN = 0.05
"""Share of unknown tokens in an interval that is worth a warning."""


class Interval:
    """Adds up named numbers between two records.

    Tensors are added on their device without waiting for it; numbers of the host are added apart.
    Every rank adds the same names.
    """

    def __init__(self, device: torch.device):
        # float64 counts tokens beyond 2^53 and adds losses exactly enough; some devices lack it.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._on_device: dict[str, Tensor] = {}
        self._on_host: dict[str, float] = {}
        self._adds: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a 0-dim tensor, or a number, to the sum of `name`; call once a step for each name."""
        self._adds[name] = self._adds.get(name, 0) + 1
        if isinstance(value, Tensor):
            value = value.detach().to(self._device, self._dtype)
            self._on_device[name] = self._on_device[name] + value if name in self._on_device else value.clone()
        else:
            self._on_host[name] = self._on_host.get(name, 0.0) + value

    def reduce(self, group: dist.ProcessGroup | None) -> tuple[int, dict[str, float]]:
        """Steps of the interval, and each sum over its steps and the ranks of `group`; starts the next interval.

        `group` is a CPU group, None for one process. One transfer from the device, one all-reduce.
        """
        steps = max(self._adds.values(), default=0)
        names = [*self._on_device, *self._on_host]
        parts = [torch.stack(list(self._on_device.values())).cpu().double()] if self._on_device else []
        sums = torch.cat([*parts, torch.tensor(list(self._on_host.values()), dtype=torch.float64)])
        self._clear()
        if group is not None and names:
            dist.all_reduce(sums, group=group)
        return steps, dict(zip(names, sums.tolist(), strict=True))


class IntervalMetrics:
    """Adds up steps and writes a record of their means (seconds a step, nats a token)."""

    def __init__(
        self,
        device: torch.device,
        ranks: Ranks,
        config: Config,
        progress: Progress,
        records: Records,
        learning_rate: Callable[[int], float],
        hosts: Sequence[str] = (),
    ):
        self._ranks, self._progress, self._records = ranks, progress, records
        self._device, self._learning_rate, self._hosts = device, learning_rate, hosts
        self._warned = False
        self._watches_spikes = config.guards.spike != "none"
        self._summed = ("cross_entropy", "valid", "grad_norm", *(("objective",) if config.train.loss else ()))
        self._peak = peak_flops(device) * ranks.world_size
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)
        self.slowest = 0.0
        """Longest step so far, seconds."""
        self.restart()

    def restart(self) -> None:
        """Begins an interval at the current step; what was added and not written is dropped."""
        self._interval = Interval(self._device)
        self._tokens_before = self._progress.tokens
        self._own_seconds, self._waited_before = 0.0, waited_seconds()

    def add(self, result: StepResult, *, wait: float, own: float, seconds: float) -> None:
        """Takes in one step: `wait` for data, `own` until the ranks first meet in it, and `seconds` in all.

        Loss and norm of a step whose update was skipped do not count.
        """
        counts = ~result.skipped
        for name in self._summed:
            value = getattr(result, name)
            self._interval.add(name, torch.where(counts.to(value.device), value, 0))
        self._interval.add("steps", counts)
        self._interval.add("wait", wait)
        self._interval.add("seconds", seconds)
        self._own_seconds += own
        self.slowest = max(self.slowest, seconds)

    def write(self, loader: DataCounts, own: Mapping[str, float] | None = None) -> None:
        """Records the interval and starts the next; nothing if no step was made since the last record.

        `loader` says what was read; `own`: metrics of the user's. An interval of which no update was made has
        NaN for its loss and norm.
        """
        progress = self._progress
        if progress.tokens == self._tokens_before:
            return
        for name, count in loader.counts().items():
            self._interval.add(name, count)
        steps, sums = self._interval.reduce(self._ranks.cpu_group)
        ranks = self._ranks.world_size
        seconds = sums["seconds"] / ranks
        made = sums["steps"] / ranks
        progress.skipped_steps += steps - round(made)
        means = {name: sums[name] / max(1.0, sums["valid"]) if made else math.nan for name in self._summed}
        loss = means["cross_entropy"]
        progress.loss = loss if made else progress.loss
        progress.tokens_per_second = (progress.tokens - self._tokens_before) / seconds
        self._tokens_before = progress.tokens
        progress.skipped_rows += round(sums["skipped_rows"])
        self._records.write(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": loss,
                **({"objective": means["objective"]} if "objective" in means else {}),
                "grad_norm": sums["grad_norm"] / ranks / made if made else math.nan,
                "lr": self._learning_rate(progress.step),
                "tokens_per_second": progress.tokens_per_second,
                "step_seconds": seconds / steps,
                "data_wait_seconds": sums["wait"] / ranks / steps,
                "memory_bytes": peak_memory(self._device),
                **self._utilisation(progress.tokens_per_second),
                **{f"data_epoch/{name}" if name else "data_epoch": turns for name, turns in loader.epochs().items()},
                **self._read(sums),
                "skipped_steps": progress.skipped_steps,
                **({"spikes": progress.spikes, "rewinds": progress.rewinds} if self._watches_spikes else {}),
                **self._of_each_rank(self._own_seconds / steps, seconds / steps),
                **(own or {}),
            }
        )
        self._own_seconds, self._waited_before = 0.0, waited_seconds()

    def _read(self, sums: dict[str, float]) -> dict[str, float]:
        """What was wrong with the text: bad rows so far, and the share of the interval's tokens that are unknown."""
        unknown = sums["unknown_tokens"] / max(1.0, sums["input_tokens"])
        if unknown > MANY_UNKNOWN and not self._warned:
            self._warned = True
            self._records.message(
                f"warning: {unknown:.1%} of the tokens are unknown: the tokenizer has no pieces for this text; set "
                "data.tokenizer to one with byte fallback, such as stablelm train-tokenizer makes"
            )
        return {"skipped_rows": self._progress.skipped_rows, "unknown_tokens": unknown}

    def _of_each_rank(self, own: float, step_seconds: float) -> dict[str, Any]:
        """Seconds of the interval in which reads waited for a store, where it was longest, and the slowest rank.

        `own`: this rank's seconds a step until ranks first meet in it.
        """
        table = torch.zeros(2, self._ranks.world_size, dtype=torch.float64)
        table[:, self._ranks.rank] = torch.tensor([own, waited_seconds() - self._waited_before], dtype=torch.float64)
        if self._ranks.cpu_group is not None:
            dist.all_reduce(table, group=self._ranks.cpu_group)
        return {"store_wait_seconds": float(table[1].max()), **self._straggler(table[0], step_seconds)}

    def _straggler(self, own: Tensor, step_seconds: float) -> dict[str, Any]:
        """The rank that keeps the others waiting longest, with its host and its seconds a step; none if all are even.

        Inside the passes ranks wait for each other, so what counts is a step's time before they first meet.
        own: (ranks,).
        """
        slowest = int(own.argmax())
        if float(own[slowest] - own.median()) < NOTICEABLE * step_seconds or len(own) == 1:
            return {}
        return {
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
            "slowest_rank_seconds": float(own[slowest]),
        }

    def _utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B); nothing where the peak is not known."""
        return {"mfu": self._flops_per_token * tokens_per_second / self._peak} if self._peak else {}


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s that the vendor promises for a GPU; 0 for a CPU and for what the table lacks."""
    accelerator = named_by(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return accelerator.peak if accelerator else 0.0


def peak_memory(device: torch.device) -> int:
    """Largest memory of this rank so far, bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
