"""Two attempts of one run in one folder: the older one never commits once the newer one has begun."""

import json
import random
import threading

import pytest
from support.saved import assert_equal, blanks, left_over, save_toy, toy_tensors

from stablelm.checkpoint import commit, fence, manifest, selection
from stablelm.checkpoint.format import load_tensors
from stablelm.errors import CheckpointError, StorageError

TAKEN = r"attempt new on .* has taken over .* since 20.*\(fencing token 2; this attempt holds 1\).*commits nothing more"


def steps(root):
    return [manifest.step_of(path) or 0 for path in selection.step_directories(root)]


def test_tokens_grow_and_say_who_took_them(tmp_path):
    root = tmp_path / "new" / "checkpoints"
    assert [fence.take(root, name).token for name in ("a", "b", "c")] == [1, 2, 3]
    assert fence.read_token(root, 2)["attempt"] == "b"
    assert set(json.loads((root / "fence" / "00000003").read_text())) == {"attempt", "host", "time", "id"}


def test_tokens_are_never_shared(tmp_path):
    taken = []
    threads = [threading.Thread(target=lambda: taken.append(fence.take(tmp_path, "a").token)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


def test_the_token_is_in_the_commit(tmp_path):
    fence.take(tmp_path, "first")
    path = save_toy(tmp_path, 1, fence=fence.take(tmp_path, "second")).path
    assert (manifest.read_commit(path).token, manifest.read_commit(path).attempt) == (2, "second")


@pytest.mark.parametrize("meanwhile", ["nothing", "the same step", "a later step"])
def test_an_older_attempt_that_stalled_after_its_check_commits_nothing(tmp_path, monkeypatch, meanwhile):
    older = fence.take(tmp_path, "old")
    kept = save_toy(tmp_path, 1, fence=older).path
    rename, made = commit.rename_to_new, []

    def stalled(source, target):
        monkeypatch.undo()
        newer = fence.take(tmp_path, "new")
        made.append(selection.newest_valid(tmp_path, on_damaged=lambda path, why: pytest.fail(why)))
        if meanwhile != "nothing":
            made.append(save_toy(tmp_path, 2 if meanwhile == "the same step" else 3, fence=newer).path)
        return rename(source, target)

    monkeypatch.setattr(commit, "rename_to_new", stalled)
    with pytest.raises(CheckpointError, match=TAKEN):
        save_toy(tmp_path, 2, fence=older)
    assert made[0] == kept
    assert steps(tmp_path) == [manifest.step_of(path) for path in reversed(made[1:])] + [1]
    assert all(manifest.read_commit(path).attempt == "new" for path in made[1:])
    assert left_over(tmp_path) == []


def test_a_commit_that_wins_the_race_is_found_by_the_newer_attempt(tmp_path, monkeypatch):
    older = fence.take(tmp_path, "old")
    checked, swept, sweep, rename = threading.Event(), threading.Event(), fence.sweep, commit.rename_to_new
    saving = threading.Thread(target=save_toy, args=(tmp_path, 5), kwargs={"fence": older})

    def stalled(*arguments):
        checked.set()
        swept.wait(60)
        return rename(*arguments)

    def last_moment(*arguments):
        swept.set()
        saving.join()
        return sweep(*arguments)

    # The older attempt checked before the newer one took its token, and renames between that and the sweep.
    monkeypatch.setattr(commit, "rename_to_new", stalled)
    monkeypatch.setattr(fence, "sweep", last_moment)
    saving.start()
    assert checked.wait(60)
    fence.take(tmp_path, "new")
    assert steps(tmp_path) == [5]
    assert left_over(tmp_path) == []


def test_an_older_attempt_ends_at_its_next_save_and_in_the_middle_of_one(tmp_path, monkeypatch):
    older = fence.take(tmp_path, "old")
    save = commit.save_tensors

    def overtaken(*arguments):
        monkeypatch.undo()
        fence.take(tmp_path, "new")
        return save(*arguments)

    monkeypatch.setattr(commit, "save_tensors", overtaken)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=TAKEN) as caught:
            save_toy(tmp_path, 2, fence=older)
        assert caught.value.exit_code == 78
    assert steps(tmp_path) == []
    assert left_over(tmp_path) == []


def test_a_damaged_step_that_was_saved_anew_meanwhile_is_not_set_aside(tmp_path, monkeypatch):
    older = fence.take(tmp_path, "old")
    (save_toy(tmp_path, 2, fence=older).path / "state.json").write_text("{}")
    check = fence.Fence.check

    def checked_in_time(self):
        monkeypatch.undo()
        check(self)
        save_toy(tmp_path, 2, fence=fence.take(tmp_path, "new"))

    def before_the_commit(part):
        if part == "check of its tensors":
            monkeypatch.setattr(fence.Fence, "check", checked_in_time)

    with pytest.raises(CheckpointError, match=TAKEN):
        save_toy(tmp_path, 2, fence=older, reached=before_the_commit)
    path = tmp_path / "step-00000002"
    assert (manifest.verify(path), manifest.read_commit(path).attempt) == ([], "new")


def test_two_attempts_racing_in_threads_leave_one_history(tmp_path):
    """Both save the same steps with random pauses; whatever comes after the newer one's look is its own."""
    for seed in range(8):
        root, draw = tmp_path / str(seed), random.Random(seed)
        older, looked, ended = fence.take(root, "old"), [], []

        def old(older=older, ended=ended):
            try:
                for step in range(1, 40):
                    save_toy(older.root, step, fence=older)
            except CheckpointError as error:
                ended.append(str(error))

        thread = threading.Thread(target=old)
        thread.start()
        threading.Event().wait(draw.uniform(0, 0.1))
        newer = fence.take(root, "new")
        looked = steps(root)
        start = max(looked, default=0)
        for step in range(start + 1, start + 4):
            save_toy(root, step, fence=newer)
        thread.join()
        if ended:
            assert "has taken over" in ended[0], ended
        by_whom = {manifest.step_of(p): manifest.read_commit(p).attempt for p in selection.step_directories(root)}
        assert by_whom == {s: "old" if s <= start else "new" for s in range(1, start + 4)}
        path = selection.resolve_checkpoint(root)
        loaded = blanks(toy_tensors())
        load_tensors(path / "tensors", loaded, None)
        assert_equal(loaded, toy_tensors(start + 3))


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write a checkpoint to"):
        fence.take(tmp_path / "file", "a")
