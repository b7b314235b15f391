"""From steps to records: sums of the current interval, one reduction over ranks and one host sync a record."""

import math
from collections.abc import Callable
from typing import Any

import torch

from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.errors import DivergedError
from stablelm.model.flops import flops_per_token
from stablelm.observe.metrics import Interval
from stablelm.plan.accelerators import named_by
from stablelm.train.progress import Progress
from stablelm.train.schedule import learning_rate
from stablelm.train.step import StepResult


class Meter:
    """Adds up steps and writes a record of their means (seconds a step, nats a token)."""

    def __init__(
        self,
        device: torch.device,
        ranks: Ranks,
        config: Config,
        progress: Progress,
        record: Callable[[dict[str, Any]], None],
    ):
        self._ranks, self._config, self._progress, self._record = ranks, config, progress, record
        self._device = device
        self._interval = Interval(device)
        self._tokens_before = progress.tokens
        self._peak = peak_flops(device) * ranks.world_size
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)
        self.slowest = 0.0
        """Longest step so far, seconds."""

    def add(self, result: StepResult, *, wait: float, seconds: float) -> None:
        """Takes in one step: `wait` for data and `seconds` in all."""
        self._interval.add("cross_entropy", result.cross_entropy)
        self._interval.add("valid", result.valid)
        self._interval.add("grad_norm", result.grad_norm)
        self._interval.add("wait", wait)
        self._interval.add("seconds", seconds)
        self.slowest = max(self.slowest, seconds)

    def write(self, epochs: dict[str, float]) -> None:
        """Records the interval and starts the next; nothing if no step was made since the last record.

        `epochs`: how often each source of text was read, by name.

        Raises DivergedError, on all ranks, when the loss is not finite.
        """
        progress = self._progress
        if progress.tokens == self._tokens_before:
            return
        steps, sums = self._interval.reduce(self._ranks.cpu_group)
        ranks = self._ranks.world_size
        seconds = sums["seconds"] / ranks
        progress.loss = sums["cross_entropy"] / max(1.0, sums["valid"])
        progress.tokens_per_second = (progress.tokens - self._tokens_before) / seconds
        self._tokens_before = progress.tokens
        self._record(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": progress.loss,
                "grad_norm": sums["grad_norm"] / ranks / steps,
                "lr": learning_rate(progress.step, self._config.train),
                "tokens_per_second": progress.tokens_per_second,
                "step_seconds": seconds / steps,
                "data_wait_seconds": sums["wait"] / ranks / steps,
                "memory_bytes": peak_memory(self._device),
                **self._utilisation(progress.tokens_per_second),
                **{f"data_epoch/{name}" if name else "data_epoch": turns for name, turns in epochs.items()},
            }
        )
        if not math.isfinite(progress.loss):
            raise DivergedError(
                f"the loss is {progress.loss} at step {progress.step};"
                " start again from an earlier checkpoint with a lower train.lr or a more stable model.method"
            )

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
