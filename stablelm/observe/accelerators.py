"""Accelerators that a plan knows: what their vendors' data sheets promise, and the network we assume between nodes."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stablelm.errors import ConfigError

DEFAULT = "h100-80"


@dataclass(frozen=True)
class Accelerator:
    """One device of a node.

    `peak`: dense bf16 FLOP/s; `memory`: bytes; `memory_bandwidth`: bytes/s; `link`: bytes/s that the device sends (and
    at the same time receives) over all its links inside the node; `network`: bytes/s each way of its share of the
    network between nodes, an assumption; `host_link`: bytes/s each way to the host's memory; `power`: the vendor's
    limit in watts (TDP or TBP), None if unknown; `driver`: a regular expression for the driver's name of the device.
    """

    name: str
    peak: float
    memory: float
    memory_bandwidth: float
    link: float = 32e9
    network: float = 25e9
    host_link: float = 32e9
    power: float | None = None
    driver: str = r"(?!)"


# Data sheets give tensor-core rates with 2:4 sparsity and links as the sum of both directions: both are halved here.
# Figures are those of the data sheets named, read at second hand; the network is what the vendor's own server has.
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        # NVIDIA A100 Tensor Core GPU data sheet (A100 40GB SXM): 312 TFLOPS dense (624 with sparsity), 1,555 GB/s,
        # NVLink 600 GB/s, PCIe Gen4 64 GB/s, 400 W. Network: one 200 Gb/s adapter a device (DGX A100).
        Accelerator("a100-40", 312e12, 40e9, 1.555e12, 300e9, 25e9, 32e9, 400, r"\bA100\b.*\b40GB( PCIe)?$"),
        # The same data sheet (A100 80GB SXM): 2,039 GB/s.
        Accelerator("a100-80", 312e12, 80e9, 2.039e12, 300e9, 25e9, 32e9, 400, r"\bA100\b.*\b80GB( PCIe)?$"),
        # NVIDIA H100 Tensor Core GPU data sheet (H100 SXM): 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s,
        # PCIe Gen5 128 GB/s, 700 W. Network: one 400 Gb/s adapter a device (DGX H100), as for H200, B200 and MI300X.
        Accelerator("h100-80", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 64e9, 700, r"\bH100 80GB HBM3$"),
        # NVIDIA H200 Tensor Core GPU data sheet (H200 SXM): as H100, with 141 GB and 4.8 TB/s.
        Accelerator("h200", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, 64e9, 700, r"\bH200$"),
        # NVIDIA DGX B200 data sheet: eight devices with 1,440 GB and 64 TB/s together; NVIDIA Blackwell Architecture
        # technical brief (HGX B200): 4.5 PFLOPS with sparsity, NVLink 1.8 TB/s, PCIe Gen5 128 GB/s, 1,000 W.
        Accelerator("b200", 2250e12, 180e9, 8e12, 900e9, 50e9, 64e9, 1000, r"\bB200$"),
        # NVIDIA L40S data sheet: 362.05 TFLOPS dense (733 with sparsity), 48 GB, 864 GB/s, no NVLink, PCIe Gen4 x16
        # 64 GB/s, 350 W. Network: one 200 Gb/s adapter for two devices.
        Accelerator("l40s", 362.05e12, 48e9, 864e9, 32e9, 12.5e9, 32e9, 350, r"\bL40S$"),
        # NVIDIA Ada GPU Architecture white paper (GeForce RTX 4090): bf16 with fp32 accumulation 165.2 TFLOPS dense
        # (330.4 with sparsity), 24 GB, 1,008 GB/s, 450 W, PCIe Gen4 x16 64 GB/s and no direct path between devices.
        # Network: one 100 Gb/s adapter for eight devices.
        Accelerator("rtx4090", 165.2e12, 24e9, 1.008e12, 32e9, 1.5625e9, 32e9, 450, r"\bRTX 4090$"),
        # AMD Instinct MI300X accelerator data sheet: 1,307.4 TFLOPS dense, 192 GB, 5.3 TB/s, seven Infinity Fabric
        # links of 128 GB/s (both directions), PCIe Gen5 128 GB/s, 750 W.
        Accelerator("mi300x", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9, 64e9, 750, r"\bMI300X\b"),
    )
}

# Flag: field of `Accelerator`, what one of its unit is, the unit, and the range that holds no slip of a unit.
FLAGS = {
    "--peak-tflops": ("peak", 1e12, "TFLOPS", 1, 100_000),
    "--memory-gb": ("memory", 1e9, "GB", 1, 10_000),
    "--bandwidth": ("memory_bandwidth", 1e9, "GB/s", 10, 1_000_000),
    "--link-bandwidth": ("link", 1e9, "GB/s", 0.1, 100_000),
    "--network-bandwidth": ("network", 1e9, "GB/s", 0.01, 100_000),
    "--host-bandwidth": ("host_link", 1e9, "GB/s", 0.1, 100_000),
    "--watts": ("power", 1, "W", 1, 100_000),
}
NEEDED = tuple(FLAGS)[:3]


def named_by(driver: str) -> Accelerator | None:
    """The accelerator that a driver calls `driver`, such as "NVIDIA H100 80GB HBM3"; None for others.

    Boards of the same chip with other rates (H100 PCIe and NVL, RTX 4090 D and Laptop) are others.
    """
    return next((known for known in ACCELERATORS.values() if re.search(known.driver, driver.strip(), re.I)), None)


def find(name: str) -> Accelerator:
    """The accelerator of that name; ConfigError for one that the table lacks."""
    known = ACCELERATORS.get(name.lower())
    if known is None:
        near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1, cutoff=0.5)
        raise ConfigError(
            f"--gpu {name} is not in the table{f', did you mean {near[0]}?' if near else ''} (one of "
            f"{', '.join(ACCELERATORS)}); describe any other by {', '.join(NEEDED[:-1])} and {NEEDED[-1]}"
        )
    return known


def chosen(name: str | None, figures: Mapping[str, float | None]) -> Accelerator:
    """The accelerator of that name, or one that `figures` describe; `figures`: values by the names in `FLAGS`.

    Links, network and power also replace those of an accelerator in the table. ConfigError for a figure out of its
    range or of no name, a description that lacks something, or one of an accelerator that the table describes.
    """
    given = {flag: value for flag, value in figures.items() if value is not None}
    for flag, value in given.items():
        if flag not in FLAGS:
            raise ConfigError(f"{flag} does not describe an accelerator; give some of {', '.join(FLAGS)}")
        _, _, unit, low, high = FLAGS[flag]
        if not low <= value <= high:
            raise ConfigError(f"{flag} {value:g} must be between {low:,} and {high:,} {unit}")
    described = [flag for flag in NEEDED if flag in given]
    fields = {FLAGS[flag][0]: value * FLAGS[flag][1] for flag, value in given.items()}
    if not described:
        return replace(find(name or DEFAULT), **fields)
    lacking = [flag for flag in NEEDED if flag not in given]
    if lacking:
        raise ConfigError(f"an accelerator described by {' and '.join(described)} also needs {' and '.join(lacking)}")
    if name is not None and name.lower() in ACCELERATORS:
        raise ConfigError(
            f"--gpu {name} is in the table, so {' and '.join(described)} cannot describe it; use another name, or "
            "leave the description out"
        )
    return Accelerator(name or "custom", **fields)
