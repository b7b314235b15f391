"""Steps in 8-bit products on the device against fp32 on the CPU, eager and compiled."""

import pytest
import torch
from gpu_report import GpuReport
from on_device import alone, configure, difference, engine_of, mean_loss, small, step, text_of
from test_methods import gradient_of

from stablelm.engine.ranks import check_float8
from stablelm.errors import ConfigError


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("method", ["pre_ln", "magneto_sigma"])
def test_a_step_is_near_that_of_fp32(method: str, recipe: str, mode: str, device: torch.device, report: GpuReport):
    try:
        check_float8(recipe, device)
    except ConfigError as error:
        pytest.skip(str(error))
    size, cpu, text = small(device), torch.device("cpu"), text_of(small(device))
    wanted = engine_of(configure(size, f"model.method={method}", "train.precision=fp32"), cpu)
    gradient, reference = gradient_of(wanted, text), step(wanted, alone(cpu), text)
    keys = ("train.precision=bf16", f"train.float8={recipe}", "train.float8_min_width=16")
    compiled = f"train.compile={str(mode == 'compiled').lower()}"
    engine = engine_of(configure(size, f"model.method={method}", compiled, *keys), device)
    apart, result = difference(gradient_of(engine, text), gradient), step(engine, alone(device), text)
    assert mean_loss(result) == pytest.approx(mean_loss(reference), rel=2e-2)
    assert float(result.grad_norm) == pytest.approx(float(reference.grad_norm), rel=0.1)
    assert apart < 0.4
    assert mean_loss(step(engine, alone(device), text, 2)) < mean_loss(result)
    report.add("A step in float8 against fp32 on the CPU", f"{method} {recipe} {mode}", gradient_apart=apart)
