"""Process groups: one for the devices, one on gloo for agreements that must not wait for the device."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from stablelm.engine.consensus import Consensus
from stablelm.engine.launch_environment import Launch
from stablelm.errors import ConfigError
from stablelm.private_names import HashStore, PrefixStore, Store

FLOAT8_FROM = (8, 9)
"""The compute capability from which GPUs multiply 8-bit floating-point numbers."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks. `cpu_group` is None when there is one process only."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None
    stop_group: dist.ProcessGroup | None
    save_group: dist.ProcessGroup | None = None
    """For saves in the background, whose collectives must not meet those of the loop."""
    nodes: int = 1
    store: Store | None = None
    """Of the process group, if there are other ranks."""
    passed: Callable[[], None] = lambda: None
    """Called by phases of `consensus` and by `gather` before this rank waits for the others."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def consensus(self) -> Consensus:
        """For phases in which all ranks fail together."""
        return Consensus(self.cpu_group, self.rank, lambda part: self.passed())

    def gather(self, value) -> list:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.cpu_group is None:
            return [value]
        self.passed()
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def barrier(self) -> None:
        if self.cpu_group is not None:
            dist.barrier(group=self.cpu_group)


def choose_device(launch: Launch, environ: Mapping[str, str] = os.environ) -> torch.device:
    """The rank's own GPU where there are any (and `ACCELERATE_USE_CPU` is not set), else the CPU.

    Under srun a task may see its own GPU alone (`--gpus-per-task`), which is number 0 then.
    """
    if environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.cuda.is_available():
        return torch.device("cpu")
    shown = torch.cuda.device_count()
    own = launch.launcher == "srun" and shown == 1 and "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")
    if own or launch.local_rank < shown:
        return torch.device("cuda", 0 if own else launch.local_rank)
    raise ConfigError(
        f"local rank {launch.local_rank} has no GPU of its own: this node shows {shown}; start as many processes a "
        "node as it has GPUs, or, under srun, one task for each GPU with --gpus-per-task=1"
    )


def check_precision(precision: str, device: torch.device) -> None:
    """ConfigError where the device cannot compute in the asked precision."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"train.precision=bf16 needs a GPU with bfloat16, which {name} has not; use fp32")


def check_float8(asked: str, device: torch.device) -> None:
    """ConfigError where a GPU does not multiply in a `train.float8`; a CPU does, slowly."""
    if asked == "none" or device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < FLOAT8_FROM:
        raise ConfigError(
            f"train.float8={asked} needs an NVIDIA GPU of compute capability {_dotted(FLOAT8_FROM)} or newer, which "
            f"{torch.cuda.get_device_name(device)} ({_dotted(capability)}) is not; set train.float8=none"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def connect(launch: Launch, kind: str, *, collective_seconds: float | None = None) -> Ranks:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and three gloo side groups; none for kind `single`.

    All ranks must come within ten minutes, and each collective must end within `collective_seconds` (None: as long).
    """
    device = choose_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if kind == "single":
        return Ranks(0, 1, device, None, None)
    join = timedelta(minutes=10)
    timeout = join if collective_seconds is None else timedelta(seconds=collective_seconds)
    store: Store = HashStore()
    if launch.world_size > 1:
        meet = f"tcp://{launch.master_addr}:{launch.master_port}" if launch.launcher == "srun" else "env://"
        store, _, _ = next(rendezvous(meet, launch.rank, launch.world_size, timeout=join))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # After a restart by torchrun its store still holds the keys of the processes that have ended.
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    own = PrefixStore("process group", store)
    # With its device NCCL connects here, where a failure names its cause, and not in the first collective.
    bound = device if device.type == "cuda" else None
    size = launch.world_size
    dist.init_process_group(backend, rank=launch.rank, world_size=size, timeout=timeout, store=own, device_id=bound)
    # The stop flag travels alone: a pending all-reduce on it must not mix with the collectives of a save.
    groups = (cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)) for _ in range(3))
    nodes = max(1, launch.world_size // launch.local_world_size)
    shared = store if launch.world_size > 1 else None
    return Ranks(launch.rank, launch.world_size, device, *groups, nodes=nodes, store=shared)


def close_groups() -> None:
    """Leaves the process groups of a run of one process that has failed."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def disconnect(ranks: Ranks) -> None:
    """Leaves the process groups once every rank is ready to: one that goes early breaks its peers' last words."""
    if ranks.cpu_group is not None:
        ranks.barrier()
        dist.destroy_process_group()
