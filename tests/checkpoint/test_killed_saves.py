"""SIGKILL and full disks at every stage of a save: the older commit stays, nothing half-made counts, a rerun works."""

import multiprocessing
import os
import resource
import signal
import subprocess

import pytest
import torch
from support.distributed import run_ranks
from support.saved import assert_equal, blanks, left_over, save_toy, shapes_of, toy_tensors

from stablelm.checkpoint import commit, fence, files, keep, manifest, portable, streams
from stablelm.errors import StorageError

STAGES = [
    "staging made",
    "tensors half written",
    "tensors written",
    "before state.json",
    "half of state.json",
    "before config.yaml",
    "before manifest.json",
    "half of manifest.json",
    "before COMMITTED",
    "half of COMMITTED",
    "before the rename",
    "after the rename",
]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def inject(stage):
    """Makes this process kill itself when it reaches a stage of saving."""
    write, write_tensor, save = files.write_durably, streams.HashingStream._write, commit.save_tensors
    verb, _, name = stage.partition(" of ") if " of " in stage else stage.partition(" ")

    def dying_write(path, content):
        if path.name == name:
            if verb == "half":
                path.write_bytes(content[: len(content) // 2])
            die()
        return write(path, content)

    def dying_tensor(self, content):
        if self.size > 1000:
            die()
        return write_tensor(self, content)

    if stage == "staging made":
        commit.save_tensors = die
    elif stage == "tensors half written":
        streams.HashingStream._write = dying_tensor
    elif stage == "tensors written":
        commit.save_tensors = lambda *arguments: (save(*arguments), die())
    elif stage == "before the rename":
        commit.rename_to_new = die
    elif stage == "after the rename":
        rename = files.rename_to_new
        commit.rename_to_new = lambda *arguments: (rename(*arguments), die())
    else:
        commit.write_durably = files.write_durably = dying_write


def killed_save(stage, root):
    inject(stage)
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
    return keep.newest_valid(root, on_damaged=lambda path, reason: pytest.fail(f"{path} looks committed: {reason}"))


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_at_any_stage_loses_nothing(tmp_path, stage):
    older = save_toy(tmp_path, 1).path
    assert in_a_fork(killed_save, stage, tmp_path) == -signal.SIGKILL
    committed = stage == "after the rename"
    assert newest(tmp_path) == (tmp_path / "step-00000002" if committed else older)
    assert bool(left_over(tmp_path)) != committed
    fence.sweep(tmp_path, 2)
    assert left_over(tmp_path) == []
    path = save_toy(tmp_path, 2).path
    assert newest(tmp_path) == path
    loaded = blanks(toy_tensors(2))
    portable.load_tensors(path / "tensors", loaded, None)
    assert_equal(loaded, toy_tensors(2))


def ranks_die(rank, world_size, stage, victims, root):
    import torch.distributed as dist

    save_toy(root, 1, group=dist.group.WORLD)
    if rank in victims:
        inject(stage)
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
        assert f"rank {rank}: {'died with exit code -9' if rank in victims else 'Traceback'}" in str(caught.value)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    fence.sweep(tmp_path, 2)
    assert left_over(tmp_path) == []


def save_under_a_file_limit(root, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_toy(root, 2)
    except StorageError as error:
        os._exit(74 if "File too large" in str(error) else 1)


@pytest.mark.parametrize("limit", [100, 3000, 10_000])
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
        with pytest.raises(StorageError, match=r"no space left .*No space left on device"):
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
