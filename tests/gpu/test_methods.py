"""A step of each method on the device against fp32 on the CPU."""

import pytest
import torch
from gpu_report import GpuReport
from on_device import alone, configure, difference, engine_of, mean_loss, small, step, text_of

from stablelm.engine.interface import Engine
from stablelm.methods.catalogue import METHODS

TOLERANCES = {"fp32": (1e-4, 1e-3, 5e-3), "bf16": (1e-2, 5e-2, 0.15)}
"""Of the loss, of the gradient norm, and of the whole gradient."""


def gradient_of(engine: Engine, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = (part.to(engine.device) for part in text)
    sums = engine.loss(tokens, targets)
    engine.backward(sums.total / sums.valid, last=True)
    found = torch.cat([each.flatten().float().cpu() for each in engine.gradients().values()])
    engine.clear_gradients()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_fp32_on_the_cpu(method: str, device: torch.device, report: GpuReport):
    size, cpu, text = small(device), torch.device("cpu"), text_of(small(device))
    wanted = engine_of(configure(size, f"model.method={method}", "train.precision=fp32"), cpu)
    gradient, reference = gradient_of(wanted, text), step(wanted, alone(cpu), text)
    for precision, (of_loss, of_norm, of_gradient) in TOLERANCES.items():
        engine = engine_of(configure(size, f"model.method={method}", f"train.precision={precision}"), device)
        apart, result = difference(gradient_of(engine, text), gradient), step(engine, alone(device), text)
        assert mean_loss(result) == pytest.approx(mean_loss(reference), rel=of_loss)
        assert float(result.grad_norm) == pytest.approx(float(reference.grad_norm), rel=of_norm)
        assert apart < of_gradient
        assert mean_loss(step(engine, alone(device), text, 2)) < mean_loss(result)
        report.add("A step against fp32 on the CPU", f"{method} {precision}", gradient_apart=apart)
