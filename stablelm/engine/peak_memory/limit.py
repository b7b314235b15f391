"""How much memory a rank's tensors may take where nobody says it."""

import os
from pathlib import Path

import torch

from stablelm.config.memory_rules import RESERVE
from stablelm.engine.ranks import Ranks

SHARE = 0.9
"""Of a host's available memory; the rest is for the interpreter, text and buffers."""
OWN = Path("/proc/self/cgroup")
VERSION_1 = (
    Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file",
)  # fmt: skip
VERSION_2 = (Path("/sys/fs/cgroup"), ("memory.max", "memory.current"), "inactive_file")


def available(ranks: Ranks) -> float:
    """Bytes: the GPU's memory less RESERVE; on a CPU a SHARE of what the host, or the job's cgroup, has available."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory - RESERVE
    here = max(1, ranks.world_size // ranks.nodes)
    return SHARE * min([_of_host(), *_of_cgroups()]) / here


def _of_host() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system than Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _of_cgroups() -> list[float]:
    """What each group around this process has left: of its limit, less what it holds and cannot drop."""
    found = []
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return []
    for number, controllers, own in lines:
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, files, dropped = VERSION_2 if number == "0" else VERSION_1
        # In a container the group may be mounted as the root itself.
        for group in {root, *(root.joinpath(*parts) for parts in _heads(Path(own.lstrip("/")).parts))}:
            try:
                most, held = (int((group / name).read_text()) for name in files)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append(float(most - held + int(stat[dropped])))
            except (OSError, ValueError, KeyError):  # no limit, or none that is shown here
                continue
    return found


def _heads(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [parts[: length + 1] for length in range(len(parts))]
