"""Shared set-up: helpers of tests/support on the path, one torch and one compiler thread a worker process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers costs more than it saves
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from support.forked import kill_started
from support.tiny import TinyCorpus, make_tiny_corpus


@pytest.fixture(autouse=True)
def _no_program_left() -> Iterator[None]:
    yield
    kill_started()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A small corpus and its tokenizer, made once for each worker process."""
    return make_tiny_corpus(tmp_path_factory.mktemp("tiny"))
