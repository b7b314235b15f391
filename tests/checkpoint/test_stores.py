"""Checkpoints in object stores: saved, found, loaded, retained, damaged and cut off as in a folder."""

import json
import pickle
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile
from support.saved import STATE, assert_equal, blanks, save_small, save_toy, shapes_of, toy_tensors
from support.stores import all_objects, in_memory, rewrite, s3_server

from stablelm.checkpoint import commit, fence, manifest, remote_path, retention, saved_run, selection
from stablelm.checkpoint.format import load_tensors
from stablelm.checkpoint.remote_path import RemotePath, checkpoint_path
from stablelm.errors import CheckpointError, ConfigError, DataError, StorageError


@pytest.fixture(scope="module")
def server():
    with s3_server() as variables:
        yield variables


@pytest.fixture(params=["memory", "s3"])
def root(request, tmp_path):
    if request.param == "memory":
        return in_memory()
    request.getfixturevalue("server")
    return RemotePath(f"s3://bucket/{tmp_path.name}/run/checkpoints")


def newest(root):
    reports = []
    return selection.newest_valid(root, on_damaged=lambda path, reason: reports.append(reason)), reports


def load(path):
    tensors = blanks(toy_tensors())
    load_tensors(path / "tensors", tensors, None)
    return tensors


def test_a_step_is_saved_found_loaded_and_retained(root):
    mine = fence.take(root, "a1")
    paths = [save_toy(root, step, fence=mine).path for step in (1, 2, 3)]
    assert paths[2].parent == root / "step-00000003"
    assert paths[2].name.startswith("00000001-")
    assert newest(root) == (paths[2], [])
    assert_equal(load(paths[2]), toy_tensors(3))
    assert saved_run.read_state(paths[2]) == {**STATE, "step": 3}
    assert manifest.read_commit(paths[2]).token == 1
    assert save_toy(root, 3, fence=mine).path == paths[2]
    assert retention.retain(root, 1, 2) == [paths[0]]
    assert selection.step_directories(root) == [paths[2], paths[1]]
    for named in (str(root.parent), str(root), str(root / "step-00000003"), str(paths[2])):
        assert selection.resolve_checkpoint(named) == paths[2]
    assert commit.dry_run(mine, toy_tensors(), group=None).bytes > 0
    assert {name.split("/")[0] for name in all_objects(root)} == {"step-00000002", "step-00000003"}


TENSORS = ["tensors/index.json", "tensors/rank-00000-0.safetensors"]


@pytest.mark.parametrize("name", [*TENSORS, "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_damaged_objects_are_skipped_loudly(name, harm):
    root = in_memory()
    mine = fence.take(root, "a1")
    older, newer = (save_toy(root, step, fence=mine).path for step in (1, 2))
    content = bytearray((newer / name).read_bytes())
    if harm == "missing":
        (newer / name).remove()
    else:
        content[len(content) // 2] ^= 4
        rewrite(newer / name, bytes(content[:-1] if harm == "truncated" else content))
    found, reports = newest(root)
    assert found == older
    assert len(reports) == 1
    assert name.split("/")[-1] in reports[0]
    with pytest.raises(CheckpointError, match="damaged"):
        selection.resolve_checkpoint(newer)
    again = save_toy(root, 2, fence=fence.take(root, "a2")).path
    assert newest(root) == (again, [])


def test_what_must_be_new_is_never_overwritten(root):
    path = root / "object"
    path.create(b"first")
    with pytest.raises(FileExistsError):
        path.create(b"second")
    path.create(b"first")  # as when a request is repeated because its answer was lost
    assert path.read_bytes() == b"first"


def test_a_stalled_older_attempt_cannot_commit(root: Any, monkeypatch):
    """It has passed its check and sleeps; the newer one starts, and whatever it does then, the older one's is void."""
    older = fence.take(root, "old")
    kept = save_toy(root, 1, fence=older).path
    create, newer = RemotePath.create, []

    def stalled(path, content):
        if path.name == "COMMITTED" and not newer:
            newer.append(None)  # the sweep creates objects of that name
            newer[0] = fence.take(root, "new")
            assert newest(root) == (kept, [])
        create(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "create", stalled)
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=r"attempt new .* has taken over .*fencing token 2.* holds 1"):
                save_toy(root, step, fence=older)
    assert newest(root) == (kept, [])
    path = save_toy(root, 2, fence=newer[0]).path
    assert newest(root) == (path, [])
    assert_equal(load(path), toy_tensors(2))


def test_a_commit_before_the_sweep_is_seen_by_the_newer_attempt(root, monkeypatch):
    older = fence.take(root, "old")
    sweep = fence.sweep

    def last_moment(root, token):
        monkeypatch.setattr(fence, "sweep", sweep)
        monkeypatch.setattr(fence.Fence, "check", lambda self: None)  # it was made just before the token was taken
        save_toy(root, 7, fence=older)
        return sweep(root, token)

    monkeypatch.setattr(fence, "sweep", last_moment)
    fence.take(root, "new")
    found, reports = newest(root)
    assert found is not None
    assert (manifest.step_of(found), reports) == (7, [])


def test_two_attempts_that_start_at_once_get_different_tokens(root, monkeypatch):
    create, first = RemotePath.create, []

    def slow(path, content):
        if not first:
            first.append(None)
            first[0] = fence.take(root, "faster")
        create(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "create", slow)
        slower = fence.take(root, "slower")
    assert [slower.token, first[0].token] == [2, 1]


def break_store(monkeypatch, when):
    """Makes the store refuse what `when` picks by the object's name and the method."""

    def wrap(name, original):
        def method(self, path, *arguments, **options):
            if when(str(path), name, *arguments):
                raise TimeoutError("no answer")
            return original(self, path, *arguments, **options)

        return method

    kind = type(in_memory().fs)
    for name in ("pipe_file", "cat_file", "_open", "info"):
        monkeypatch.setattr(kind, name, wrap(name, getattr(kind, name)))


@pytest.mark.parametrize("name", ["state.json", "rank-00000-0.safetensors", "index.json", "manifest.json", "COMMITTED"])
def test_a_store_that_fails_in_mid_save_keeps_the_older_commit(monkeypatch, name):
    root = in_memory()
    older = save_toy(root, 1).path
    before = all_objects(root)
    writes = ("pipe_file", "_open")
    with monkeypatch.context() as patched:
        break_store(
            patched, lambda path, method, *rest: path.endswith(name) and method in writes and rest[:1] != ("rb",)
        )
        with pytest.raises(StorageError, match=r"cannot write a checkpoint to memory://.*TimeoutError.*kept") as caught:
            save_toy(root, 2)
    assert caught.value.exit_code == 74
    assert all_objects(root) == before
    assert newest(root) == (older, [])
    assert newest(root)[0] != save_toy(root, 2).path


def test_a_store_in_mid_upload_loses_the_connection(monkeypatch):
    root = in_memory()
    older = save_toy(root, 1).path

    def cut(self, content):
        raise ConnectionResetError("cut")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "write", cut)
        with pytest.raises(StorageError, match="cut"):
            save_toy(root, 2)
    assert newest(root) == (older, [])
    assert len(selection.step_directories(root)) == 1


def test_a_store_that_does_not_answer_says_nothing_of_its_checkpoints(monkeypatch):
    root = in_memory()
    for step in (1, 2):
        path = save_toy(root, step).path
    break_store(monkeypatch, lambda path, method, *rest: "step-00000002" in path and path.endswith("state.json"))
    for read in (lambda: newest(root), lambda: saved_run.read_state(path), lambda: selection.resolve_checkpoint(path)):
        with pytest.raises(DataError, match=r"the store failed \(TimeoutError: no answer\); run again") as caught:
            read()
        assert caught.value.exit_code == 77
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_store_that_overwrites_is_refused(monkeypatch):
    root = in_memory()
    kind = type(root.fs)
    pipe = kind.pipe_file
    monkeypatch.setattr(kind, "pipe_file", lambda self, path, value, mode="overwrite": pipe(self, path, value))
    with pytest.raises(ConfigError, match="overwrites objects although asked not to"):
        fence.take(root, "a")


@pytest.mark.parametrize(
    ("url", "words"),
    [("hdfs://host/run", "not known to create objects on condition"), ("gs://bucket/run", "needs the package gcsfs")],
)
def test_stores_that_cannot_keep_attempts_apart_are_refused(url, words):
    with pytest.raises(ConfigError, match=words):
        checkpoint_path(url)


def test_a_missing_bucket_is_one_sentence(server):
    with pytest.raises(StorageError, match="cannot write a checkpoint to s3://absent"):
        fence.take(checkpoint_path("s3://absent/run"), "a")


def test_large_files_go_up_in_parts(server, monkeypatch):
    monkeypatch.setattr(remote_path, "BLOCK", 5 << 20)
    import torch

    root = RemotePath("s3://bucket/large")
    tensors = {"model.w": torch.arange(3 << 20, dtype=torch.float32)}
    path = commit.save(fence.take(root, "a"), 1, tensors, {}, "", shapes=shapes_of(tensors), group=None).path
    loaded = {"model.w": torch.zeros(3 << 20)}
    assert manifest.verify(path) == []
    load_tensors(path / "tensors", loaded, None)
    assert_equal(loaded, tensors)


def test_the_commands_work_on_a_store(server, capsys):
    import importlib.util
    from pathlib import Path

    program = Path(__file__).resolve().parents[2] / "launch" / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("checkpoints_program", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = RemotePath("s3://bucket/commands/checkpoints")
    paths = [save_small(root, step).path for step in (1, 2)]
    assert module.main(["list", "s3://bucket/commands"]) == 0
    assert "step-00000002" in capsys.readouterr().out
    assert module.main(["verify", str(root)]) == 0
    rewrite(paths[1] / "state.json", json.dumps({}).encode())
    assert module.main(["verify", str(root / "step-00000002")]) == 78
    capsys.readouterr()
    save_toy(root, 3)
    assert module.main(["prune", "s3://bucket/commands", "--keep", "1"]) == 0
    assert capsys.readouterr().out == f"deleted {paths[0]}\n"
