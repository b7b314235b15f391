"""Switches of torch, and of Python, that hold for the whole process."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from stablelm.config.schema import Config

GPU_COLLECTION = 50  # steps, as torchtitan's default
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
LARGE, NEVER = 100_000, 2**30  # bytes from which a tensor gets pages of its own
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


def arrange_heap(config: Config, device: torch.device) -> None:
    """Has the C library keep the memory of a CPU's freed tensors for those of the next step.

    By itself it returns that of large ones, and the system clears it anew in every step, up to a sixth of its time.
    Under `engine.memory_limit` each freed tensor is returned at once: the heap would keep holes between tensors of
    differing lifetimes, 15 to 20 % of a deep model's memory. Only the GNU C library is asked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type != "cpu" or mallopt is None:
        return
    if config.engine.memory_limit is None:
        mallopt(TRIM_THRESHOLD, NEVER)
        mallopt(MMAP_THRESHOLD, NEVER)
    else:
        mallopt(MMAP_THRESHOLD, LARGE)


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
