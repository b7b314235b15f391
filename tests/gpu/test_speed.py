"""Tokens a second and MFU of 24 x 1,024, eager and compiled, beside what `plan` expects."""

import statistics
import time

import pytest
import torch
from gpu_report import GpuReport
from on_device import DEEP, TINY, alone, configure, engine_of, mean_loss, sizes, step, text_of, wait

import stablelm
from stablelm.methods.sizes import flops_per_token
from stablelm.observe.accelerators import DEFAULT, named_by

METHODS = ("pre_ln", "deepscalelm_sigma")


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_training_speed(method: str, mode: str, device: torch.device, report: GpuReport):
    on_gpu = device.type == "cuda"
    size, steps = (DEEP, 10) if on_gpu else (TINY, 2)
    overrides = (f"model.method={method}", "train.precision=bf16", f"train.compile={str(mode == 'compiled').lower()}")
    config = configure(size, *overrides)
    engine, text, ranks = engine_of(config, device), text_of(size), alone(device)
    began = time.perf_counter()
    losses = [step(engine, ranks, text)]
    wait(device)
    first, seconds = time.perf_counter() - began, []
    for number in range(2, 4 + steps):
        began = time.perf_counter()
        losses.append(step(engine, ranks, text, number))
        wait(device)
        seconds.append(time.perf_counter() - began)
    assert mean_loss(losses[-1]) < mean_loss(losses[0])
    rate = size.batch * size.seq_len / statistics.median(seconds[2:])
    known = named_by(torch.cuda.get_device_name()) if on_gpu else None
    planned = stablelm.plan(
        stablelm.load_config(overrides=[*overrides, f"model.vocab_size={size.vocab_size}", *sizes(size)]),
        world_size=1, gpu=known.name if known else DEFAULT, quick=not on_gpu,
    )  # fmt: skip
    report.add(
        f"Speed of {size.n_layers} x {size.d_model} at {size.batch} x {size.seq_len}, bf16", f"{method} {mode}",
        tokens_per_second=rate, planned=float(planned["estimated"]["tokens_per_second"]),
        mfu=rate * flops_per_token(config.model, size.seq_len) / known.peak if known else None,
        planned_mfu=float(planned["estimated"]["mfu"]), first_step_seconds=first,
        peak_bytes=float(torch.cuda.max_memory_allocated()) if on_gpu else None,
    )  # fmt: skip
