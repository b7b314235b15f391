"""Complete runs with what their process is set to: the losses on a CPU are those of any other run."""

import json
import shutil
from pathlib import Path

import pytest
from support.programs import TINY, losses, run
from support.tiny import TinyCorpus


def start(corpus: TinyCorpus, run_dir: Path, *extra: str):
    line = [*TINY, *corpus.overrides(), f"run.dir={run_dir}", "evaluate.batches=1", "train.steps=4", *extra]
    done = run("pretrain", *line)
    assert done.returncode in (0, 75), done.stderr
    return done


def test_deterministic_kernels_and_collections_by_hand_change_no_bit(tiny_corpus: TinyCorpus, tmp_path: Path):
    plain = start(tiny_corpus, tmp_path / "plain")
    start(tiny_corpus, tmp_path / "set", "train.deterministic=true", "engine.gc_every=1", "train.compile=false")
    assert losses(tmp_path / "set") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "compiled").exists()  # auto means no on a CPU
    assert "environment:" not in plain.stdout
    (attempt,) = json.loads((tmp_path / "set" / "provenance.json").read_text())
    assert attempt["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.slow
def test_the_next_attempt_uses_the_kernels_of_the_first(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    used = "using the kernels that an earlier attempt compiled"
    compiled = ("train.compile=true", "model.n_layers=2", "evaluate.every=2")

    def attempt(name: str, folder: str, *extra: str) -> str:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder))  # another machine's
        return start(tiny_corpus, tmp_path / name, *compiled, *extra).stdout

    assert used not in attempt("run", "first", "run.stop_after=2")
    assert used in attempt("run", "second")
    assert used not in attempt("unbroken", "third")
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
