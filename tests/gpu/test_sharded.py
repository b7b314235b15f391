"""FSDP2 on one rank, over NCCL where there is a GPU, is one process; offloading changes nothing."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from gpu_report import GpuReport
from on_device import alone, configure, engine_of, mean_loss, small, step, text_of
from torch.distributed.tensor import DTensor

from stablelm.engine.interface import build_engine
from stablelm.engine.launch_environment import Launch
from stablelm.engine.ranks import Ranks, connect, disconnect


@pytest.fixture
def ranks(device: torch.device) -> Iterator[Ranks]:
    joined = connect(Launch(), "fsdp2")
    yield joined
    disconnect(joined)


@pytest.mark.parametrize("offload", ["none", "parameters"])
def test_two_steps_are_those_of_one_process(offload: str, device: torch.device, ranks: Ranks, report: GpuReport):
    size = small(device)
    settings = ("model.method=deepscalelm_sigma", "train.precision=bf16")
    if device.type == "cuda":
        assert "nccl" in str(dist.get_backend(dist.group.WORLD)) and ranks.device == device
    engine = build_engine(configure(size, *settings, "engine.kind=fsdp2", f"engine.offload={offload}"), "fsdp2", ranks)
    assert any(isinstance(parameter, DTensor) for parameter in engine.parameters().values())  # pyright: ignore[reportAttributeAccessIssue]
    wanted, text = engine_of(configure(size, *settings), device), text_of(size)
    for number in (1, 2, 3):
        found = step(engine, ranks, text, number, size.batch // 2)
        exact = step(wanted, alone(device), text, number, size.batch // 2)
        assert mean_loss(found) == pytest.approx(mean_loss(exact), rel=5e-3)
        assert float(found.grad_norm) == pytest.approx(float(exact.grad_norm), rel=2e-2)
    report.add("FSDP2 at world size 1", f"offload {offload}", loss=mean_loss(found), of_one_process=mean_loss(exact))
