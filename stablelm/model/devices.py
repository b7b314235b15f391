"""How tensors reach the device that computes."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the host does not wait for a copy to a GPU, and may drop the tensor at once."""
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    # Only from pinned memory, and without gaps, is a copy asynchronous; torch keeps that memory until it is done.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
