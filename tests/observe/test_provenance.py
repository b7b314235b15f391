"""provenance.json: one entry an attempt, with and without git."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from stablelm.observe import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "a.py").write_text("one\n")
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)
    commit(root)
    monkeypatch.setattr(provenance, "REPOSITORY", root)
    return root


def commit(root):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["add", "."], [*identity, "commit", "-qm", "some"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True).strip()


def entries(run_dir):
    return json.loads((run_dir / "provenance.json").read_text())


def test_attempts_add_up(tmp_path, checkout):
    assert provenance.write(tmp_path, ["launch/pretrain.py", "train.lr=1"], 4) == 1
    assert provenance.write(tmp_path, ["launch/pretrain.py"], 2, hosts=["a", "b"], attention="flex") == 2
    first, second = entries(tmp_path)
    assert (first["attempt"], first["argv"], first["world_size"]) == (1, ["launch/pretrain.py", "train.lr=1"], 4)
    assert (second["attempt"], second["hosts"], second["world_size"]) == (2, ["a", "b"], 2)
    assert (first["attention_kernel"], second["attention_kernel"]) == (None, "flex")
    assert len(first["hosts"]) == 1
    assert first["versions"]["torch"]
    assert first["python"].startswith("3.")


def test_a_clean_checkout_has_a_commit_and_no_diff(tmp_path, checkout):
    (checkout / "a.py").write_text("two\n")
    of_program = commit(checkout)
    provenance.write(tmp_path, [], 1)
    assert (entries(tmp_path)[0]["commit"], entries(tmp_path)[0]["diff"]) == (of_program, None)


def test_results_of_studies_and_tests_are_not_the_program(tmp_path, checkout):
    """They are committed and changed while further runs of the same program are made."""
    before = provenance.git_state(checkout)
    for folder in ("docs/studies/a/results", "tests"):
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "x.json").write_text("1\n")
    commit(checkout)
    (checkout / "tests" / "x.json").write_text("2\n")
    assert provenance.git_state(checkout) == before
    (checkout / "docs.py").write_text("1\n")
    assert commit(checkout) == provenance.git_state(checkout)[0] != before[0]


def test_jobs_on_slurm_copy_the_commit_of_the_same_program():
    library = (Path(__file__).parents[2] / "slurm" / "lib.sh").read_text()
    assert f"local program=({' '.join(shlex.quote(each) for each in provenance.PROGRAM)})\n" in library


def test_changes_are_kept_with_each_attempt(tmp_path, checkout):
    (checkout / "a.py").write_bytes(b"two \xff\n")
    provenance.write(tmp_path, [], 1)
    (checkout / "a.py").write_text("three\n")
    provenance.write(tmp_path, [], 1)
    assert [told["diff"] for told in entries(tmp_path)] == ["provenance-1.diff", "provenance-2.diff"]
    assert b"-one\n+two \xff\n" in (tmp_path / "provenance-1.diff").read_bytes()
    assert "+three" in (tmp_path / "provenance-2.diff").read_text()


def test_a_folder_that_is_no_checkout(tmp_path, monkeypatch):
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setattr(provenance, "REPOSITORY", plain)
    assert provenance.write(tmp_path, [], 1) == 1
    assert (entries(tmp_path)[0]["commit"], entries(tmp_path)[0]["diff"]) == (None, None)


def test_installed_inside_another_checkout(tmp_path, checkout, monkeypatch):
    inside = checkout / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(provenance, "REPOSITORY", inside)
    provenance.write(tmp_path, [], 1)
    assert entries(tmp_path)[0]["commit"] is None


def test_without_git(tmp_path, checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance.write(tmp_path, [], 1)
    assert entries(tmp_path)[0]["commit"] is None


@pytest.mark.parametrize("content", ["", "[{", "3", '["x"]'])
def test_a_damaged_file_is_begun_anew(tmp_path, checkout, content):
    (tmp_path / "provenance.json").write_text(content)
    assert provenance.write(tmp_path, [], 1) == 1
    assert len(entries(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_the_callers_to_tell(tmp_path, checkout):
    with pytest.raises(OSError, match="missing"):
        provenance.write(tmp_path / "missing", [], 1)
