"""The kernels that attention runs, by name, and their numbers against fp32 on the CPU."""

import re

import pytest
import torch
from gpu_report import GpuReport
from on_device import Size, configure, difference, engine_of, small, text_of
from torch.profiler import ProfilerActivity, profile

CASES = {
    "causal": (),
    "grouped": ("model.kv_heads=1",),
    "documents": (),
    "grouped documents": ("model.kv_heads=1",),
    "alibi": ("model.attention.position=alibi",),
    "grouped alibi": ("model.kv_heads=1", "model.attention.position=alibi"),
    "logit cap": ("model.attention.logit_cap=30",),
}
FUSED = r"flash|cudnn.*(sdpa|attention|fprop)|fmha|flex"
WITHIN_DOCUMENTS = r"_flash_attention_forward|flash_fwd|flex"
MATH = "aten::_scaled_dot_product_attention_math"


def kernels(engine, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Names of all operators and kernels of both passes, sorted, and the gradient of the embedding."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if tokens.is_cuda else [])]
    with profile(activities=activities) as run:
        sums = engine.loss(tokens, targets)
        engine.backward(sums.total / sums.valid, last=True)
    gradients = torch.cat([each.flatten().float().cpu() for each in engine.gradients().values()])
    engine.clear_gradients()
    return sorted({event.key for event in run.key_averages()}), gradients


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, device: torch.device, report: GpuReport):
    size: Size = small(device)._replace(d_model=128 if device.type == "cpu" else 256)
    overrides, end = ("model.method=pre_ln", *CASES[case]), 1 if "documents" in case else None
    tokens, targets = (part.to(device) for part in text_of(size))
    engine = engine_of(configure(size, *overrides, "train.precision=bf16", document_end=end), device)
    kernels(engine, tokens, targets)  # compiles what is compiled
    names, gradient = kernels(engine, tokens, targets)
    shown = [name for name in names if re.search(rf"{FUSED}|attention|softmax", name)]
    report.add("Attention kernels", case, kernels=", ".join(name.removeprefix("aten::") for name in shown))
    wanted = engine_of(configure(size, *overrides, "train.precision=fp32", document_end=end), torch.device("cpu"))
    _, exact = kernels(wanted, tokens.cpu(), targets.cpu())
    assert difference(gradient, exact) < 0.1
    if device.type == "cuda" or case in ("causal", "grouped"):
        assert any(re.search(FUSED, name) for name in names), names
        assert MATH not in names
    if device.type == "cuda" and "documents" in case:
        assert any(re.search(WITHIN_DOCUMENTS, name) for name in names), names
