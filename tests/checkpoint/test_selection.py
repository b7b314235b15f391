import random
import shutil
from pathlib import Path

import pytest
from support.saved import flip_bit, left_over, save_toy

from stablelm.checkpoint import fence, manifest, retention, saved_run, selection
from stablelm.errors import CheckpointError, StorageError

TENSORS = ["tensors/index.json", "tensors/rank-00000-0.safetensors"]
KINDS = [*TENSORS, "state.json", "config.yaml", "manifest.json", "COMMITTED"]


def sweep_all(root):
    return fence.sweep(root, 10**8)


def newest(root):
    reports = []
    return selection.newest_valid(root, on_damaged=lambda path, reason: reports.append((path.name, reason))), reports


@pytest.fixture
def two(tmp_path):
    for step in (10, 20):
        save_toy(tmp_path, step)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_single_flipped_bits_are_found_in_every_kind_of_file(two, kind):
    path = two / "step-00000020" / kind
    whole = path.read_bytes()
    draw = random.Random(kind)
    for position in draw.sample(range(8 * len(whole)), min(200, 8 * len(whole))):
        flip_bit(path, position)
        found, reports = newest(two)
        assert found == two / "step-00000010", position
        ((name, reason),) = reports
        assert name == "step-00000020"
        assert path.name in reason
        path.write_bytes(whole)
    assert newest(two) == (two / "step-00000020", [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["truncated", "emptied", "missing", "a directory"])
def test_truncated_and_missing_files_are_found(two, kind, harm):
    path = two / "step-00000020" / kind
    whole = path.read_bytes()
    path.unlink()
    if harm == "a directory":
        path.mkdir()
    elif harm != "missing":
        path.write_bytes(whole[:-1] if harm == "truncated" else b"")
    found, reports = newest(two)
    assert found == two / "step-00000010"
    assert path.name in reports[0][1]


@pytest.mark.parametrize("name", ["tensors/rank-00001-0.safetensors", "extra", "deep/er/file"])
def test_extra_files_are_found(two, name):
    path = two / "step-00000020" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert manifest.verify(two / "step-00000020") == [f"{name} is not in the manifest"]


def test_a_step_under_another_name_is_found(two):
    (two / "step-00000020").rename(two / "step-00000030")
    assert manifest.verify(two / "step-00000030") == ["it holds step 20, not the step of its name"]


def test_a_manifest_of_another_step_is_found(two):
    shutil.copy(two / "step-00000010" / "manifest.json", two / "step-00000020")
    assert manifest.verify(two / "step-00000020") == ["manifest.json is not the one that was committed"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])
    assert sweep_all(tmp_path / "absent") == []


def test_unfinished_and_set_aside_ones_are_not_looked_at(two):
    for name in (".staging-00000030-x", ".deleting-step-00000040-x", "damaged-step-00000050-x", "step-60"):
        shutil.copytree(two / "step-00000020", two / name)
    assert newest(two) == (two / "step-00000020", [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save_toy(tmp_path, step)
    assert [manifest.step_of(path) for path in selection.step_directories(tmp_path)] == [100_000_000, 99_999_999, 5]


def steps(root):
    return [manifest.step_of(path) for path in reversed(selection.step_directories(root))]


def test_retention_keeps_the_newest_and_the_permanent(tmp_path):
    for step in range(100, 800, 100):
        save_toy(tmp_path, step)
    assert [path.name for path in retention.retain(tmp_path, 2, 300)] == [
        "step-00000500",
        "step-00000400",
        "step-00000200",
        "step-00000100",
    ]
    assert steps(tmp_path) == [300, 600, 700]
    assert retention.retain(tmp_path, 2, 300) == []
    retention.retain(tmp_path, 1, None)
    assert steps(tmp_path) == [700]
    assert left_over(tmp_path) == []


def test_retention_counts_only_valid_ones_and_deletes_no_damaged_one(tmp_path):
    for step in (1, 2, 3, 4):
        save_toy(tmp_path, step)
    (tmp_path / "step-00000003" / "COMMITTED").unlink()
    (tmp_path / "step-00000004" / "state.json").write_text("")
    assert retention.retain(tmp_path, 1, None) == [tmp_path / "step-00000001"]
    assert steps(tmp_path) == [2, 3, 4]
    assert newest(tmp_path)[0] == tmp_path / "step-00000002"


def test_retention_with_hashes_keeps_the_only_valid_one(two):
    flip_bit(two / "step-00000020" / "tensors/rank-00000-0.safetensors", 99)
    assert retention.retain(two, 1, None, hashes=True) == []
    assert newest(two)[0] == two / "step-00000010"


def test_a_deletion_cut_short_leaves_nothing_that_looks_valid(two, monkeypatch):
    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(retention.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        retention.retain(two, 1, None)
    monkeypatch.undo()
    assert steps(two) == [20]
    (left,) = left_over(two)
    assert left.startswith(".deleting-step-00000010-")
    assert sweep_all(two) == [two / left]
    assert left_over(two) == []


def test_a_deletion_on_read_only_storage_says_so(two, monkeypatch):
    def refuse(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        retention.retain(two, 1, None)


def test_cleaning_spares_commits_and_what_was_set_aside(two):
    for name in (".staging-00000030-x", ".deleting-step-00000005-x", "damaged-step-00000002-x"):
        (two / name / "tensors").mkdir(parents=True)
    assert [path.name for path in sweep_all(two)] == [".deleting-step-00000005-x", ".staging-00000030-x"]
    assert left_over(two) == ["damaged-step-00000002-x"]
    assert steps(two) == [10, 20]


def test_a_run_a_checkpoints_and_a_step_directory_all_resolve(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        save_toy(run / "checkpoints", step)
    wanted = run / "checkpoints" / "step-00000002"
    assert selection.resolve_checkpoint(run) == wanted
    assert selection.resolve_checkpoint(run / "checkpoints") == wanted
    assert selection.resolve_checkpoint(wanted.with_name("step-00000001")).name == "step-00000001"


def test_a_run_with_its_checkpoints_elsewhere_resolves_where_the_user_says_so(tmp_path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    save_toy(scratch, 3)
    run.mkdir()
    (run / "config.yaml").write_text(f"checkpoint:\n  dir: {scratch}\n")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; its config.yaml says checkpoint.dir="):
        selection.resolve_checkpoint(run)
    assert selection.resolve_checkpoint(run, elsewhere=scratch) == scratch / "step-00000003"
    (run / "checkpoints").symlink_to(scratch)
    with pytest.raises(CheckpointError, match="its checkpoints is a link to"):
        selection.resolve_checkpoint(run)
    save_toy(run, 4)
    assert selection.resolve_checkpoint(run, elsewhere=scratch) == run / "step-00000004"


def test_a_linked_step_counts_and_is_left_alone_by_retention(tmp_path, caplog):
    for step in (1, 2, 3):
        save_toy(tmp_path, step)
    (tmp_path / "archive").mkdir()
    (tmp_path / "step-00000001").rename(tmp_path / "archive" / "step-00000001")
    (tmp_path / "step-00000001").symlink_to(tmp_path / "archive" / "step-00000001")
    assert retention.retain(tmp_path, 1, None) == [tmp_path / "step-00000002"]
    assert retention.retain(tmp_path, 1, None) == []
    assert steps(tmp_path) == [1, 3]
    assert steps(tmp_path / "archive") == [1]
    assert caplog.text.count("step-00000001 is a link and is left alone") == 1


def test_what_cannot_be_resolved_is_explained(tmp_path, caplog):
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        selection.resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        selection.resolve_checkpoint(tmp_path)
    path = save_toy(tmp_path, 3).path
    (path / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged \(state.json has 0 bytes"):
        selection.resolve_checkpoint(path)
    with pytest.raises(CheckpointError, match="holds only damaged checkpoints"):
        selection.resolve_checkpoint(tmp_path)
    assert "state.json has 0 bytes" in caplog.text


def test_state_that_is_no_json_is_explained(two):
    (two / "step-00000010" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.json"):
        saved_run.read_state(two / "step-00000010")
