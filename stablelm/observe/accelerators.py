"""Accelerators that a plan knows: what their vendors' data sheets promise, and the network we assume between nodes."""

from dataclasses import dataclass

from stablelm.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One device of a node.

    `peak`: dense bf16 FLOP/s; `memory`: bytes; `memory_bandwidth`: bytes/s; `link`: bytes/s that the device sends (and
    at the same time receives) over all its links inside the node; `network`: bytes/s each way of its share of the
    network between nodes, an assumption; `host_link`: bytes/s each way to the host's memory.
    """

    name: str
    peak: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    host_link: float


# Data sheets give tensor-core rates with 2:4 sparsity and links as the sum of both directions: both are halved here.
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        # NVIDIA A100 Tensor Core GPU data sheet (A100 80GB SXM): 312 TFLOPS dense, 2,039 GB/s, NVLink 600 GB/s,
        # PCIe Gen4 64 GB/s. Network: one 200 Gb/s adapter a device (DGX A100).
        Accelerator("a100-80", 312e12, 80e9, 2.039e12, 300e9, 25e9, 32e9),
        # NVIDIA H100 Tensor Core GPU data sheet (H100 SXM): 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s,
        # PCIe Gen5 128 GB/s. Network: one 400 Gb/s adapter a device (DGX H100), as for all that follow.
        Accelerator("h100-80", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 64e9),
        # NVIDIA H200 Tensor Core GPU data sheet (H200 SXM): as H100, with 141 GB and 4.8 TB/s.
        Accelerator("h200", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, 64e9),
        # NVIDIA DGX B200 data sheet: eight devices with 1,440 GB and 64 TB/s together; NVIDIA Blackwell Architecture
        # technical brief (HGX B200): 4.5 PFLOPS with sparsity, NVLink 1.8 TB/s, PCIe Gen5 128 GB/s.
        Accelerator("b200", 2250e12, 180e9, 8e12, 900e9, 50e9, 64e9),
        # AMD Instinct MI300X accelerator data sheet: 1,307.4 TFLOPS dense, 192 GB, 5.3 TB/s, seven Infinity Fabric
        # links of 128 GB/s (both directions), PCIe Gen5 128 GB/s.
        Accelerator("mi300x", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9, 64e9),
    )
}


def named_by(driver: str) -> Accelerator | None:
    """The accelerator that a driver calls `driver`, such as "NVIDIA H100 80GB HBM3"; None for others."""
    words = driver.upper().replace("-", " ").split()
    return next((known for name, known in ACCELERATORS.items() if name.partition("-")[0].upper() in words), None)


def find(name: str) -> Accelerator:
    """The accelerator of that name; ConfigError for one that the table lacks."""
    if name not in ACCELERATORS:
        raise ConfigError(f"--gpu {name} is not in the table; choose one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
