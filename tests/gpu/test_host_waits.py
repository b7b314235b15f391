"""A training step never makes the host wait for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from on_device import alone, configure, engine_of, mean_loss, small, step, text_of


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Torch raises where the host waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["pre_ln", "deepscalelm_sigma", "magneto", "catformer"])
def test_no_wait_in_a_step(method: str, device: torch.device):
    size = small(device)
    engine = engine_of(configure(size, f"model.method={method}", "train.precision=bf16"), device)
    text, first = text_of(size), []
    first.append(step(engine, alone(device), text, 1, size.batch // 2))  # buffers and kernels that are made once
    with waits_are_errors(device):
        for number in (2, 3):
            first.append(step(engine, alone(device), text, number, size.batch // 2))
    assert mean_loss(first[2]) < mean_loss(first[0])


def test_document_masks_need_no_wait_either(device: torch.device):
    size = small(device)
    config = configure(size, "model.method=pre_ln", "train.precision=bf16", document_end=1)
    engine, text = engine_of(config, device), text_of(size)
    step(engine, alone(device), text)
    with waits_are_errors(device):
        result = step(engine, alone(device), text, 2)
    assert mean_loss(result) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU; run make test-gpu on a machine with one")
def test_a_wait_would_raise():
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="synchroniz"), waits_are_errors(device):
        torch.ones(1, device=device).item()
