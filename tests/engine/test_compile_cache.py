"""Compiled kernels are kept for the next attempt of the same run and user, and never taken from anybody else."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from stablelm.config.schema import Config, RunConfig, TrainConfig
from stablelm.engine.process.compile_cache import FOLDER, CompileCache
from stablelm.engine.process.environment import is_own, own_compile_folder
from stablelm.engine.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """A home of its own; torch's artifacts are bytes that say so, and what it is given to load is listed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    seen: dict[str, list] = {"loaded": [], "compiled": [b"kernels"]}
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (seen["compiled"][-1], None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", seen["loaded"].append)
    return seen


def cache(run_dir: Path, said: list[str], ranks: Ranks = ALONE, *, compiled: bool = True) -> CompileCache:
    run_dir.mkdir(exist_ok=True)
    return CompileCache(
        Config(run=RunConfig(dir=str(run_dir)), train=TrainConfig(compile=compiled)), ranks, said.append
    )


def test_the_next_attempt_gets_the_kernels(tmp_path: Path, places: dict[str, list]):
    said: list[str] = []
    first = cache(tmp_path / "run", said)
    first.load()
    first.keep()
    assert (said, places["loaded"]) == ([], [])
    cache(tmp_path / "run", said).load()
    assert places["loaded"] == [b"kernels"]
    assert "using the kernels that an earlier attempt compiled" in said[0]
    places["compiled"].append(b"kernels and those of the evaluation")
    first.keep()
    cache(tmp_path / "run", said).load()
    assert places["loaded"][-1] == b"kernels and those of the evaluation"


def test_nothing_is_kept_where_nothing_is_compiled_or_by_ranks_of_other_nodes(tmp_path: Path):
    cache(tmp_path / "run", [], compiled=False).keep()
    cache(tmp_path / "run", [], Ranks(2, 4, torch.device("cpu"), None, None, nodes=2)).keep()
    assert not (tmp_path / "run" / FOLDER).exists()


@pytest.mark.parametrize("how", ["another user's key", "changed", "another run", "cut off"])
def test_kernels_of_others_are_never_loaded(
    how: str, tmp_path: Path, places: dict[str, list], monkeypatch: pytest.MonkeyPatch
):
    cache(tmp_path / "run", []).keep()
    run, said = tmp_path / "run", []
    (file,) = (run / FOLDER).iterdir()
    if how == "another user's key":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other home"))
    elif how == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif how == "cut off":
        file.write_bytes(b"")
    else:
        run = tmp_path / "copied"
        shutil.copytree(tmp_path / "run", run)
    cache(run, said).load()
    assert places["loaded"] == []
    assert "is damaged, or not written by this user in this folder: compiling again" in said[0]


def test_a_key_that_others_can_read_is_none(tmp_path: Path, places: dict[str, list]):
    cache(tmp_path / "run", []).keep()
    (tmp_path / "home" / "stablelm" / "compiled.key").chmod(0o644)
    cache(tmp_path / "run", []).load()
    assert places["loaded"] == []


def test_torch_compiles_into_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def chosen() -> Path:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        own_compile_folder()
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    usual = chosen()
    assert is_own(usual) and usual.parent == tmp_path and chosen() == usual
    usual.chmod(0o777)  # somebody else may have put kernels there
    other = chosen()
    assert other != usual and is_own(other)
    usual.rmdir()
    usual.symlink_to(other)
    assert chosen() not in (usual, other)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/users/own")
    own_compile_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/users/own"
