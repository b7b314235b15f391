import time

import pytest
from support import distributed
from support.distributed import run_ranks


def add_ranks(rank, world_size, offset):
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return rank, world_size, total.item() + offset


def fail_on_one_rank(rank, world_size):
    if rank == 1:
        raise ValueError("the words of the child")
    time.sleep(600)


def sleep(rank, world_size):
    time.sleep(600)


def test_results_come_in_rank_order():
    assert run_ranks(add_ranks, 2, 0.5) == [(0, 2, 1.5), (1, 2, 1.5)]


def test_one_failure_ends_all_with_its_traceback(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0.5)
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: Traceback.*in fail_on_one_rank.*the words of the child"):
        run_ranks(fail_on_one_rank, 2)


def test_ranks_that_hang_are_killed():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] did not end in 3 s"):
        run_ranks(sleep, 1, timeout=3)
    assert time.monotonic() - started < 20
