import errno
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.disks import small_files
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

from stablelm import new_files
from stablelm.checkpoint import commit, manifest, saved_run
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.format import load_tensors
from stablelm.engine.tensor_parts import FlatShard
from stablelm.errors import CheckpointError, StorageError


def test_a_saved_step_holds_everything_and_loads_back(tmp_path):
    result = save_toy(tmp_path / "run" / "checkpoints", 1200)
    assert result.path.name == "step-00001200"
    assert manifest.files_below(result.path) == {
        "tensors/index.json",
        "tensors/rank-00000-0.safetensors",
        "state.json",
        "config.yaml",
        "manifest.json",
        "COMMITTED",
    }
    assert manifest.verify(result.path) == []
    listed = json.loads((result.path / "manifest.json").read_text())["files"]
    assert result.bytes == sum(entry["size"] for entry in listed.values())
    assert list(listed) == sorted(listed)
    assert manifest.read_commit(result.path).attempt == "a1"
    assert saved_run.read_state(result.path) == {**STATE, "step": 1200}
    assert (result.path / "config.yaml").read_text() == CONFIG
    loaded = blanks(toy_tensors(1200))
    load_tensors(result.path / "tensors", loaded, None)
    assert_equal(loaded, toy_tensors(1200))
    assert left_over(result.path.parent) == []


def test_equal_content_gives_equal_files(tmp_path):
    first, second = save_toy(tmp_path / "a", 3).path, save_toy(tmp_path / "b", 3).path
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_saving_a_committed_step_again_changes_nothing(tmp_path):
    first = save_toy(tmp_path, 5)
    before = {name: (first.path / name).stat().st_mtime_ns for name in manifest.files_below(first.path)}
    again = save_toy(tmp_path, 5)
    assert (again.path, again.bytes) == (first.path, first.bytes)
    assert before == {name: (first.path / name).stat().st_mtime_ns for name in manifest.files_below(first.path)}


def test_a_damaged_step_is_set_aside_and_saved_anew(tmp_path, caplog):
    path = save_toy(tmp_path, 5).path
    (path / "state.json").write_text("{}")
    assert save_toy(tmp_path, 5).path == path
    assert manifest.verify(path) == []
    (aside,) = left_over(tmp_path)
    assert aside.startswith("damaged-step-00000005-")
    assert (tmp_path / aside / "state.json").read_text() == "{}"
    assert "state.json has 2 bytes" in caplog.text


def test_a_rehearsal_leaves_nothing_and_tells_bytes_and_time(tmp_path):
    told = commit.dry_run(Fence(tmp_path / "new", 1, "a1"), toy_tensors(7), group=None)
    assert list((tmp_path / "new").iterdir()) == []
    assert told.bytes == sum(tensor.nbytes for tensor in toy_tensors(7).values())
    assert told.seconds > 0


def test_a_rehearsal_writes_a_bounded_part_of_a_large_checkpoint(tmp_path):
    """Under a limit of 64 MiB and a header a file; the seconds are those of all of it."""
    tensors = {"model.large": torch.ones(1, 1 << 20).expand(90, -1).contiguous(), "model.small": torch.ones(3)}
    with small_files(commit.SAMPLE_BYTES + 4096):
        started = time.perf_counter()
        told = commit.dry_run(Fence(tmp_path, 1, "a1"), tensors, group=None)
        took = time.perf_counter() - started
    assert told.bytes == 4 * 90 * 2**20 + 12
    assert took < told.seconds < 6 * took
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_asks_for_the_space_of_a_whole_checkpoint(tmp_path):
    whole = torch.empty(1).expand(2**30, 2**10)  # 4 TiB, of which no byte is written
    shard = FlatShard(torch.ones(8), whole.shape, 0)
    with pytest.raises(StorageError, match=r"free, but a checkpoint needs 4300\.80 GiB"):
        commit.dry_run(Fence(tmp_path, 1, "a1"), {"model.w": shard}, group=None)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointError, match=r"something else wrote to .* while step 5 was saved"):
        save_toy(tmp_path, 5, reached=lambda part: save_toy(tmp_path, 5) if part == "manifest" else None)
    assert manifest.verify(tmp_path / "step-00000005") == []
    assert left_over(tmp_path) == []


def test_values_that_are_no_json_are_an_error_and_leave_nothing(tmp_path):
    tensors, state = toy_tensors(), {"x": torch.ones(1)}
    with pytest.raises(TypeError):
        commit.save(Fence(tmp_path, 1, "a"), 1, tensors, state, "", shapes=shapes_of(tensors), group=None)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    save_toy(tmp_path, 1)
    monkeypatch.setattr(commit, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(commit, "save_tensors", lambda *arguments: pytest.fail("wrote"))
    with pytest.raises(StorageError, match=r"has 0.00 GiB free, but a checkpoint needs .*checkpoint.keep") as caught:
        save_toy(tmp_path, 2)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_free_bytes_are_those_an_ordinary_user_may_write(tmp_path, monkeypatch):
    class Status:
        f_bavail, f_bfree, f_frsize, f_bsize = 10, 20, 512, 4096

    monkeypatch.setattr(new_files.os, "statvfs", lambda path: Status)
    assert new_files.free_bytes(tmp_path) == 5120


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match=r"cannot write a checkpoint to .*checkpoints .*checkpoint.dir"):
        save_toy(tmp_path / "checkpoints", 1)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("refused", ["state.json", "manifest.json", "COMMITTED"])
def test_storage_that_refuses_a_file_keeps_the_older_commit(tmp_path, monkeypatch, code, refused):
    save_toy(tmp_path, 1)
    write = new_files.write_durably

    def refusing(path, content):
        if path.name == refused:
            raise OSError(code, "refused", str(path))
        return write(path, content)

    monkeypatch.setattr(commit, "write_durably", refusing)
    monkeypatch.setattr(manifest, "write_durably", refusing)
    with pytest.raises(StorageError, match=r"refused.*committed checkpoints are kept") as caught:
        save_toy(tmp_path, 2)
    assert caught.value.exit_code == 74
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_other_errors_are_not_dressed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "sync_directory", lambda path: (_ for _ in ()).throw(OSError(errno.EINVAL, "odd")))
    with pytest.raises(OSError, match="odd"):
        save_toy(tmp_path, 2)


def ranks_save_and_fail(rank, world_size, root, elsewhere):
    """Two good saves, then one in which rank 1's disk is full, one where rank 1 has a bug, one unshared disk."""
    import torch.distributed as dist

    group = dist.group.WORLD
    words = []
    path = save_toy(root, 1, group=group).path
    loaded = blanks(toy_tensors(1))
    load_tensors(path / "tensors", loaded, group)
    assert_equal(loaded, toy_tensors(1))

    def attempt(more=None, root=root):
        tensors = {**toy_tensors(2), **(more or {})}
        try:
            commit.save(Fence(root, 1, "a"), 2, tensors, STATE, CONFIG, shapes=shapes_of(toy_tensors()), group=group)
        except Exception as error:
            words.append((type(error).__name__, str(error), left_over(root) if root.exists() else []))

    with small_files(1000) if rank == 1 else nullcontext():
        attempt()
    attempt({"model.bug": 3} if rank == 1 else {})
    os.chdir(root if rank == 0 else elsewhere)
    attempt(root=Path("unshared"))
    again = save_toy(root, 2, group=group)
    return words, again.bytes


@pytest.mark.slow
def test_two_ranks_share_the_work_and_fail_together(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (first, bytes_0), (second, bytes_1) = run_ranks(ranks_save_and_fail, 2, tmp_path / "shared", elsewhere)
    assert bytes_0 == bytes_1
    full, bug, unshared = zip(first, second, strict=True)
    assert full[0] == full[1]
    assert full[0][0] == "StorageError"
    assert str(tmp_path) in full[0][1]
    assert "no space" in full[0][1]
    assert [kind for kind, *_ in bug] == ["FailedElsewhere", "AssertionError"]
    assert "rank 1 failed: AssertionError: model.bug is not a tensor" in bug[0][1]
    assert unshared[0][:2] == unshared[1][:2]
    assert unshared[0][0] == "StorageError"
    assert "rank 1 does not see the directory that rank 0 made in unshared" in unshared[0][1]
    assert [staging for *_, staging in first + second[:2]] == [[]] * 5
    for step in (1, 2):
        path = tmp_path / "shared" / manifest.step_name(step)
        assert manifest.verify(path) == []
        # Replicated tensors are written once, and by both ranks.
        pieces = {piece.name: piece.stat().st_size for piece in (path / "tensors").glob("*.safetensors")}
        assert pieces.keys() == {"rank-00000-0.safetensors", "rank-00001-0.safetensors"}
        alone = save_toy(tmp_path / "alone", step).path / "tensors/rank-00000-0.safetensors"
        assert sum(pieces.values()) < 1.5 * alone.stat().st_size
