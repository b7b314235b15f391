"""Sums of an interval, on one process and over ranks."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stablelm.observe.interval_metrics import Interval


def test_sums_and_steps_then_a_new_start():
    interval = Interval(torch.device("cpu"))
    for step in range(3):
        interval.add("cross_entropy", torch.tensor(1.5 + step))
        interval.add("valid", torch.tensor(7))
        interval.add("seconds", 0.25)
    assert interval.reduce(None) == (3, {"cross_entropy": 7.5, "valid": 21.0, "seconds": 0.75})
    assert interval.reduce(None) == (0, {})


def test_small_losses_beside_large_sums_are_kept():
    interval = Interval(torch.device("cpu"))
    interval.add("x", torch.tensor(2.0**30))
    for _ in range(8):
        interval.add("x", torch.tensor(0.125))
    assert interval.reduce(None)[1]["x"] == 2.0**30 + 1


def test_a_tensor_that_changes_after_it_was_added_does_no_harm():
    interval, value = Interval(torch.device("cpu")), torch.ones((), dtype=torch.float64)
    interval.add("x", value)
    value.fill_(100)
    assert interval.reduce(None)[1] == {"x": 1.0}


def test_gradients_are_not_kept():
    interval = Interval(torch.device("cpu"))
    interval.add("x", (torch.ones((), requires_grad=True) * 2))
    assert not interval._on_device["x"].requires_grad


def _rank(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        interval = Interval(torch.device("cpu"))
        interval.add("loss", torch.tensor(float(rank + 1)))
        interval.add("wait", 10.0 * rank)
        results.put((rank, interval.reduce(dist.group.WORLD)))
    finally:
        dist.destroy_process_group()


def test_all_ranks_get_the_sums_over_ranks(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(r, str(tmp_path / "store"), results)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found[0] == found[1] == (1, {"loss": 3.0, "wait": 10.0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_adding_does_not_wait():
    interval = Interval(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        interval.add("x", torch.ones((), device="cuda"))
        interval.add("x", torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert interval.reduce(None) == (2, {"x": 2.0})
