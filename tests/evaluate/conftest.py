"""A run that the tests of this folder score."""

from pathlib import Path

import pytest
from support.programs import TINY, run
from support.tiny import TinyCorpus


@pytest.fixture(scope="session")
def trained(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small model, made once for each worker process."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    extra = ("train.steps=4", "train.lr=1e-2", "train.warmup_steps=1", f"run.dir={run_dir}")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), *extra)
    assert done.returncode == 0, done.stderr
    return run_dir
