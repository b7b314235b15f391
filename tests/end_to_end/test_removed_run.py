"""A run directory that is removed or fails in mid-run: exit code 74, and nothing is left half made."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from support.forked import start_forked
from support.programs import LAUNCH, TINY, environment
from support.tiny import TinyCorpus

from stablelm.checkpoint import selection


@pytest.mark.parametrize("way", ["removed", "moved away"])
def test_a_run_directory_that_goes_away_stays_away(tiny_corpus: TinyCorpus, tmp_path: Path, way: str):
    run_dir, output = tmp_path / "runs" / "run", tmp_path / "output"
    output.mkdir()
    line = [*TINY, *tiny_corpus.overrides(), "train.steps=100000", "checkpoint.every=20", f"run.dir={run_dir}"]
    process = start_forked(str(LAUNCH / "pretrain.py"), line, environment(), output=output)
    deadline = time.monotonic() + 60
    while not selection.step_directories(run_dir / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    if way == "removed":
        while run_dir.exists():  # a save or a record may put a file in between
            shutil.rmtree(run_dir, ignore_errors=True)
    else:
        os.rename(run_dir, tmp_path / "elsewhere")
    process.join(60)
    said = (output / "err").read_text()
    assert process.exitcode == 74, said
    assert "Traceback" not in said
    assert "removed" in said or "No such file or directory" in said
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.EIO])
def test_a_rename_that_fails_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    from support.saved import left_over, save_toy

    from stablelm.errors import StorageError

    save_toy(tmp_path, 1)
    rename = os.rename

    def failing(source, target, **options):
        if "step-" in str(target):
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match=rf"cannot write a checkpoint to .*\({os.strerror(code)}\)") as caught:
        save_toy(tmp_path, 2)
    assert caught.value.exit_code == 74
    assert left_over(tmp_path) == []
    assert [path.name for path in selection.step_directories(tmp_path)] == ["step-00000001"]
