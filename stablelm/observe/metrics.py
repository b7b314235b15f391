"""Sums over the steps of an interval: kept on the device, reduced over ranks once, read by the host once."""

import torch
import torch.distributed as dist
from torch import Tensor


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
