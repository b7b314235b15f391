"""Saves in the background: copies, one in flight, failures on all ranks, deaths at every stage."""

import errno
import multiprocessing
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.disks import KILLED, STAGES, kill_at, refuse_files, small_files
from support.distributed import run_ranks
from support.saved import (
    CONFIG,
    STATE,
    assert_equal,
    blanks,
    left_over,
    save_toy,
    shapes_of,
    toy_tensors,
)
from test_killed_saves import newest

from stablelm.checkpoint import fence, manifest
from stablelm.checkpoint.background import HostCopy, Saver
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.format import load_tensors
from stablelm.engine.tensor_parts import FlatShard
from stablelm.errors import CheckpointError, StorageError


def make(root, **options):
    settings = {"background": True, "shapes": shapes_of(toy_tensors()), **options}
    return Saver(Fence(root, 1, "a1"), settings.pop("group", None), **settings)


def put(saver, step, tensors=None, *, wait=False):
    saver.save(step, toy_tensors(step) if tensors is None else tensors, {**STATE, "step": step}, CONFIG, wait=wait)


def loaded(path):
    tensors = blanks(toy_tensors())
    load_tensors(path / "tensors", tensors, None)
    return tensors


@pytest.fixture
def gate(monkeypatch):
    """The disk makes no folder for tensors until the gate is set."""
    opened, mkdir = threading.Event(), Path.mkdir

    def slow(self, *arguments, **options):
        if self.name == "tensors":
            opened.wait(30)
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    yield opened
    opened.set()


def test_what_is_saved_is_the_state_at_the_call(tmp_path, gate):
    saver, tensors = make(tmp_path), toy_tensors(3)
    put(saver, 3, tensors)
    assert not (tmp_path / "step-00000003").exists()
    for tensor in tensors.values():
        tensor.fill_(9)
    gate.set()
    saver.wait()
    assert_equal(loaded(tmp_path / "step-00000003"), toy_tensors(3))


def test_one_save_is_in_flight_and_the_next_one_waits(tmp_path, gate):
    steps, retained = [], []
    saver = make(tmp_path, committed=steps.append, retain=lambda: retained.append(len(steps)))
    put(saver, 1)
    threading.Timer(0.3, gate.set).start()
    started = time.perf_counter()
    put(saver, 2)
    assert time.perf_counter() - started > 0.2
    assert steps == [1]
    put(saver, 3, wait=True)
    assert (steps, retained) == ([1, 2, 3], [1, 2, 3])
    assert saver.margin_seconds == 3 * saver.seconds > 0
    assert newest(tmp_path) == tmp_path / "step-00000003"


def test_without_background_a_save_returns_committed(tmp_path):
    saver = make(tmp_path, background=False)
    put(saver, 1)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    assert not saver._host._buffers


def test_a_rehearsal_takes_the_memory_and_leaves_nothing(tmp_path):
    saver = make(tmp_path)
    assert saver.dry_run(toy_tensors()).bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert saver.seconds > 0
    buffers = {name: buffer.data_ptr() for name, buffer in saver._host._buffers.items()}
    put(saver, 1, wait=False)
    saver.wait()
    assert {name: buffer.data_ptr() for name, buffer in saver._host._buffers.items()} == buffers


@pytest.mark.parametrize("name", ["rank-00000-0.safetensors", "index.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("when", ["next save", "wait", "stop"])
def test_a_failure_is_raised_once_where_the_loop_meets_it(tmp_path, monkeypatch, name, code, when):
    saver = make(tmp_path)
    put(saver, 1)
    saver.wait()

    with monkeypatch.context() as patched:
        refuse_files(patched, name, code)
        put(saver, 2)
        deadline = time.monotonic() + 20
        while not saver.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(StorageError, match="committed checkpoints are kept"):
        saver.wait() if when == "wait" else put(saver, 3, wait=when == "stop")
    assert not saver.failed
    assert left_over(tmp_path) == []
    assert newest(tmp_path) == tmp_path / "step-00000001"
    put(saver, 3, wait=True)
    assert newest(tmp_path) == tmp_path / "step-00000003"


def test_retention_that_fails_is_not_lost(tmp_path):
    def refuse():
        raise StorageError("cannot delete")

    saver = make(tmp_path, retain=refuse)
    put(saver, 1)
    with pytest.raises(StorageError, match="cannot delete"):
        saver.wait()
    assert newest(tmp_path) == tmp_path / "step-00000001"


def test_an_overtaken_attempt_learns_it_in_the_background(tmp_path, gate):
    older = Saver(fence.take(tmp_path, "old"), None, shapes=shapes_of(toy_tensors()), background=True)
    put(older, 1)
    fence.take(tmp_path, "new")
    gate.set()
    with pytest.raises(CheckpointError, match="has taken over"):
        older.wait()
    assert left_over(tmp_path) == []


def killed(stage, root):
    kill_at(stage)
    saver = make(root)
    put(saver, 2)
    saver.wait()


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_of_the_thread_at_any_stage_loses_nothing(tmp_path, stage):
    older = save_toy(tmp_path, 1).path
    process = multiprocessing.get_context("fork").Process(target=killed, args=(stage, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode in KILLED
    assert newest(tmp_path) == (tmp_path / "step-00000002" if stage == "after the rename" else older)
    mine = fence.take(tmp_path, "next")
    fence.sweep(tmp_path, 2)
    assert left_over(tmp_path) == []
    assert newest(tmp_path) != save_toy(tmp_path, 3, fence=mine).path


def test_a_failure_elsewhere_lets_the_save_in_flight_be_committed(tmp_path, gate):
    saver = make(tmp_path)
    saver.settle()
    put(saver, 2)
    gate.set()
    saver.settle()
    assert newest(tmp_path) == tmp_path / "step-00000002"


def sharded(group, seed, fill=None):
    """A DTensor and a FlatShard of it, cut unevenly, beside the replicated toys."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = torch.arange(35.0).reshape(5, 7) + seed
    cuts = [0, 11, 35] if size == 2 else [0, 35]
    flat = whole.flatten()[cuts[rank] : cuts[rank + 1]].clone()
    mesh = DeviceMesh.from_group(group, "cpu")
    tensors = {
        **toy_tensors(seed),
        "model.sharded": distribute_tensor(whole.clone(), mesh, [Shard(0)], src_data_rank=None),
        "model.flat": FlatShard(flat, whole.shape, cuts[rank]),
    }
    return tensors, whole


def ranks_save_in_the_background(rank, world_size, root):
    """A save while the loop's group works, then one that fails on rank 1 alone."""
    import torch.distributed as dist

    save_group: dist.ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
    saver = make(root, group=save_group)
    tensors, whole = sharded(dist.group.WORLD, 1)
    held = HostCopy().copy(tensors)
    shard = held["model.sharded"]
    assert isinstance(shard, FlatShard)
    assert torch.equal(shard.local, tensors["model.sharded"].to_local().flatten())
    put(saver, 1, tensors)
    for local in (tensors["model.sharded"].to_local(), tensors["model.flat"].local):
        local.fill_(-7)
    thread = saver._thread
    assert thread is not None
    alive = torch.ones(())
    while alive:  # the loop's own collectives, as many as there is time for on any rank
        alive.fill_(thread.is_alive())
        dist.all_reduce(alive)
    saver.wait()
    wanted = {**toy_tensors(1), "model.sharded": whole, "model.flat": whole}
    plain = blanks(wanted)
    load_tensors(root / "step-00000001" / "tensors", plain, dist.group.WORLD)
    assert_equal(plain, wanted)
    with small_files(1000) if rank == 1 else nullcontext():
        put(saver, 2, tensors)
        try:
            put(saver, 3)
        except StorageError as error:
            return str(error), left_over(root)


@pytest.mark.slow
def test_ranks_save_beside_the_loop_and_fail_together(tmp_path):
    results = run_ranks(ranks_save_in_the_background, 2, tmp_path)
    assert results[0] == results[1]
    assert "no space" in results[0][0]
    assert results[0][1] == []
    assert manifest.verify(tmp_path / "step-00000001") == []


def one_thread_dies(rank, world_size, root):
    import torch.distributed as dist

    group: dist.ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
    saver = make(root, group=group)
    put(saver, 1, wait=True)
    if rank == 1:
        kill_at("tensors half written")
    put(saver, 2)
    saver.wait()


@pytest.mark.slow
def test_a_rank_killed_in_the_background_ends_the_others(tmp_path):
    with pytest.raises(RuntimeError, match="rank 1: died with exit code -25") as caught:
        run_ranks(one_thread_dies, 2, tmp_path, timeout=60)
    assert "rank 0: Traceback" in str(caught.value)
    assert newest(tmp_path) == tmp_path / "step-00000001"
