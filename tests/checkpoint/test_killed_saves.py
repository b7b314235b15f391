"""SIGKILL and full disks at every stage of a save: the older commit stays, nothing half-made counts, a rerun works."""

import multiprocessing
import os
import subprocess

import pytest
import torch
from support.disks import KILLED, STAGES, kill_at, small_files
from support.distributed import run_ranks
from support.saved import assert_equal, blanks, left_over, save_toy, shapes_of, toy_tensors

from stablelm.checkpoint import commit, fence, manifest, selection
from stablelm.checkpoint.format import load_tensors
from stablelm.errors import StorageError


def killed_save(stage, root):
    kill_at(stage)
    save_toy(root, 2)


def in_a_fork(function, *arguments):
    """Exit code of a forked process that calls the function; negative: the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("the forked process hung")
    return process.exitcode


def newest(root):
    return selection.newest_valid(
        root, on_damaged=lambda path, reason: pytest.fail(f"{path} looks committed: {reason}")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_at_any_stage_loses_nothing(tmp_path, stage):
    older = save_toy(tmp_path, 1).path
    assert in_a_fork(killed_save, stage, tmp_path) in KILLED
    committed = stage == "after the rename"
    assert newest(tmp_path) == (tmp_path / "step-00000002" if committed else older)
    assert bool(left_over(tmp_path)) != committed
    fence.sweep(tmp_path, 2)
    assert left_over(tmp_path) == []
    path = save_toy(tmp_path, 2).path
    assert newest(tmp_path) == path
    loaded = blanks(toy_tensors(2))
    load_tensors(path / "tensors", loaded, None)
    assert_equal(loaded, toy_tensors(2))


def ranks_die(rank, world_size, stage, victims, root):
    import torch.distributed as dist

    save_toy(root, 1, group=dist.group.WORLD)
    if rank in victims:
        kill_at(stage)
    save_toy(root, 2, group=dist.group.WORLD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "victims"),
    [("tensors half written", [1]), ("before COMMITTED", [0]), ("tensors half written", [0, 1])],
)
def test_ranks_left_behind_end_too_and_the_older_commit_stays(tmp_path, stage, victims):
    with pytest.raises(RuntimeError) as caught:
        run_ranks(ranks_die, 2, stage, victims, tmp_path, timeout=60)
    for rank in (0, 1):
        assert f"rank {rank}: {'died with exit code -' if rank in victims else 'Traceback'}" in str(caught.value)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    fence.sweep(tmp_path, 2)
    assert left_over(tmp_path) == []


def save_under_a_file_limit(root, limit):
    with small_files(limit):
        try:
            save_toy(root, 2)
        except StorageError as error:
            os._exit(74 if "File too large" in str(error) else 1)


@pytest.mark.parametrize("limit", [100, 1000, 3000, 4700])
def test_writes_cut_off_in_mid_tensor_are_a_storage_error(tmp_path, limit):
    older = save_toy(tmp_path, 1).path
    assert in_a_fork(save_under_a_file_limit, tmp_path, limit) == 74
    assert newest(tmp_path) == older
    assert left_over(tmp_path) == []


def test_a_disk_that_is_really_full_keeps_the_older_commit(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        root = disk / "checkpoints"
        older = save_toy(root, 1).path
        big = {"model.w": torch.ones(100_000)}
        monkeypatch.setattr(commit, "free_bytes", lambda path: 2**40)  # the check before saving is not what is tested
        with pytest.raises(StorageError, match=r"no space .*No space left on device"):
            commit.save(fence.Fence(root, 1, "a"), 2, big, {}, "", shapes=shapes_of(big), group=None)
        assert newest(root) == older
        assert left_over(root) == []
        monkeypatch.undo()
        with pytest.raises(StorageError, match="free, but a checkpoint needs"):
            commit.save(fence.Fence(root, 1, "a"), 2, big, {}, "", shapes=shapes_of(big), group=None)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only file system"):
            save_toy(root, 3)
        assert manifest.verify(older) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
