"""Switches of torch, and of Python, that hold for the whole process."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from stablelm.config.schema import Config

GPU_COLLECTION = 50  # steps, as torchtitan's default
MMAP_THRESHOLD, FROM_BYTES = -3, 100_000  # mallopt's M_MMAP_THRESHOLD, and the size from which tensors get own pages
YOUNGER = 1  # generations that a collection between steps looks at: what lives longer is the model


def set_switches(config: Config) -> None:
    """Sets `engine.matmul_precision` and `train.deterministic`."""
    torch.set_float32_matmul_precision(config.engine.matmul_precision)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        # It costs a pass over every new tensor, and nothing here reads one before it is written.
        setattr(deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - pyright does not know the attribute
        torch.backends.cudnn.benchmark = False


def repeats(device: torch.device) -> bool:
    """Whether the same backward pass on a device gives the same bits twice."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def give_memory_back(config: Config, device: torch.device) -> None:
    """Has the C library return each freed tensor to the system, where `engine.memory_limit` bounds a CPU's memory.

    Otherwise its heap keeps holes between tensors of differing lifetimes: 15 to 20 % of a deep model's memory. Fresh
    pages cost time, so nothing changes without a limit. Only the GNU C library is asked.
    """
    if config.engine.memory_limit is not None and device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, FROM_BYTES)


@contextmanager
def switches_kept() -> Iterator[None]:
    """Puts back what `set_switches` changes."""
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = getattr(deterministic, "fill_uninitialized_memory")  # noqa: B009
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
        setattr(deterministic, "fill_uninitialized_memory", fill)  # noqa: B010
        torch.backends.cudnn.benchmark = benchmark


class GarbageCollection:
    """Python's collection at the same steps on all ranks, which otherwise wait for whichever collects."""

    def __init__(self, every: int | None, device: torch.device):
        """`every`: as `engine.gc_every`."""
        self._every = every if every is not None else GPU_COLLECTION * (device.type == "cuda")

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """No automatic collection inside; automatic again afterwards if it was."""
        automatic = gc.isenabled()
        if self._every:
            gc.disable()
            gc.collect(YOUNGER)
        try:
            yield
        finally:
            if automatic:
                gc.enable()

    def step(self, step: int) -> None:
        """Collects if step number `step`, which is finished, is due."""
        if self._every and step % self._every == 0:
            gc.collect(YOUNGER)
