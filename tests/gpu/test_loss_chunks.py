"""The chunked loss in chunks of many sizes: the same numbers, and which size is quickest."""

import statistics
import time

import pytest
import torch
from gpu_report import GpuReport
from on_device import difference, wait
from torch import Tensor

from stablelm.model.loss import chunked_cross_entropy

ROUNDS = 5


def test_sweep(device: torch.device, report: GpuReport):
    on_gpu = device.type == "cuda"
    n, d, vocab = (8192, 1024, 32_000) if on_gpu else (256, 64, 512)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=draw).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, d, generator=draw) * 0.02).to(device).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=draw).to(device)
    exact: tuple[float, Tensor, Tensor] | None = None
    for rows in (n // 32, n // 8, n // 2, n):
        seconds, peak, loss = [], 0, torch.zeros(())
        for _ in range(ROUNDS if on_gpu else 2):
            hidden.grad = weight.grad = None
            wait(device)
            held = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            # In fp32, which bounds the rows whatever dtype the logits have.
            sums = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=rows * vocab * 4)
            (sums.total / sums.valid).backward()
            loss = sums.cross_entropy / sums.valid
            wait(device)
            seconds.append(time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated() - held if on_gpu else 0
        assert hidden.grad is not None and weight.grad is not None
        found = float(loss), hidden.grad.clone(), weight.grad.clone()
        exact = exact or found
        assert found[0] == pytest.approx(exact[0], rel=1e-4)
        assert difference(found[1], exact[1]) < 1e-2
        assert difference(found[2], exact[2]) < 1e-2
        milliseconds = 1000 * statistics.median(seconds)
        report.add("Chunks of the loss", f"{rows} rows of {n}", milliseconds=milliseconds, peak_bytes=float(peak))
