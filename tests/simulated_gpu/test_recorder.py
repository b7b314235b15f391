"""The recorder finds what it is there to find."""

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu.conftest import Simulator
from simulated_gpu.recorder import Record
from torch import Tensor

from stablelm.private_names import multiply_all


@pytest.fixture
def record(simulator: Simulator):
    from simulated_gpu import simulation

    return lambda function: simulator(simulation.recorded, function)


def device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def fetches_a_number() -> None:
    device(3).sum().item()


def decides() -> None:
    if device(3).sum() > 0:
        raise AssertionError


def finds_places() -> None:
    device(3).nonzero()


def selects() -> None:
    values = device(3)
    values[values > 0]


@pytest.mark.parametrize("function", [fetches_a_number, decides, finds_places, selects])
def test_what_depends_on_values_of_the_device_raises(record, function):
    with pytest.raises(RuntimeError, match=r"DataDependentOutputException|DynamicOutputShapeException"):
        record(function)


def stacks_numbers() -> None:
    torch.stack([device(), torch.zeros(())])


def multiplies_many() -> None:
    multiply_all([device(3), device(2)], torch.ones(()))


def adds_vectors() -> None:
    device(3).add(torch.ones(3))


@pytest.mark.parametrize("function", [stacks_numbers, multiplies_many, adds_vectors])
def test_tensors_of_two_devices_raise(record, function):
    with pytest.raises(RuntimeError, match=r"AssertionError|FakeTensorDeviceMismatchError|same device"):
        record(function)


def sends_unpinned() -> None:
    torch.ones(3).to("cuda", non_blocking=True)


def sends_and_waits() -> None:
    torch.ones(3).pin_memory().to("cuda")


def sends_columns() -> None:
    torch.ones(3, 4).pin_memory()[:, :2].to("cuda", non_blocking=True)


def makes_of_numbers() -> None:
    torch.tensor([1.0, 2.0], device="cuda")


def fetches() -> None:
    device(3).cpu()


def fetches_unpinned() -> None:
    torch.empty(3).copy_(device(3), non_blocking=True)


def synchronises() -> None:
    torch.cuda.Event().synchronize()


@pytest.mark.parametrize(
    "function",
    [sends_unpinned, sends_and_waits, sends_columns, makes_of_numbers, fetches, fetches_unpinned, synchronises],
)
def test_the_host_waits(record, function):
    found: Record = record(function)
    assert sum(found.waits.values()) == 1
    assert not found.copies


def sends_and_fetches() -> None:
    torch.ones(3).pin_memory().to("cuda", non_blocking=True).to("cpu", non_blocking=True)
    device().add(1.5)
    device(3).mul(torch.tensor(2.0))  # a number of the host goes along with the kernel


def test_copies_that_nobody_waits_for(record):
    found: Record = record(sends_and_fetches)
    assert not found.waits
    assert [(copy.to_device, copy.shape) for copy in found.copies] == [(True, (3,)), (False, (3,))]


def works_on_the_host() -> None:
    assert int((torch.arange(5) > 2).nonzero().sum()) == 7
    assert torch.tensor([1, 2]).tolist() == [1, 2]


def test_work_on_the_host_is_real(record):
    assert record(works_on_the_host) == Record()


def pointwise() -> None:
    x = device(64, 32, dtype=torch.bfloat16)
    (x * 2).add_(x)
    x.add(device(32, dtype=torch.bfloat16).expand(64, 32))


def test_bytes_are_those_read_and_written(record):
    found: Record = record(pointwise)
    each = {launch.name: size for launch, size in found.bytes.items()}
    whole = 64 * 32 * 2
    assert each == {"zeros": whole + 64, "mul": 2 * whole, "add_": 3 * whole, "add": 2 * whole + 64}
    assert found.count() == 5
    assert found.pointwise_bytes() == sum(each.values())


def plain() -> None:
    query = device(1, 4, 8, 64, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(query, query[:, :2], query[:, :2], is_causal=True, enable_gqa=True)


def with_mask() -> None:
    query = device(1, 4, 8, 64, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(query, query, query, attn_mask=device(8, 8, dtype=torch.bfloat16))


def with_mask_and_groups() -> None:
    query = device(1, 4, 8, 64, dtype=torch.bfloat16)
    mask = device(8, 8, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(query, query[:, :2], query[:, :2], attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "kernels"),
    [
        (plain, {"_scaled_dot_product_flash_attention"}),
        (with_mask, {"_scaled_dot_product_efficient_attention"}),
        (with_mask_and_groups, set()),
    ],
)
def test_the_kernel_of_attention_is_the_one_that_torch_takes(record, function, kernels: set[str]):
    assert record(function).attention() == kernels
