"""Stores that have never answered are mistakes and not outages: 78 within seconds, and nothing is created."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import programs
from support.httpserver import serve
from support.stores import KEYS
from support.tiny import TinyCorpus

NOWHERE = "http://no-such-host.invalid"
PATHS = {
    "mistyped host": f"{NOWHERE}/c4-train.00000-of-00001.json.gz",
    "nothing listens": "http://127.0.0.1:9/c4-train.00000-of-00001.json.gz",
    "file in a mistyped object store": "s3://bucket/en/a.json.gz",
    "glob in a mistyped object store": "s3://bucket/en/*.json.gz",
    "mistyped hub": "hf://datasets/allenai/c4/en/a.json.gz",
    "data set of a mistyped hub": "allenai/c4",
}


def start(corpus: TinyCorpus, run_dir: Path, path: str, *more: str):
    arguments = (*programs.TINY, *corpus.overrides(), f"run.dir={run_dir}", f"data.path={path}", *more)
    began = time.monotonic()
    done = programs.run("pretrain", *arguments, HF_ENDPOINT=NOWHERE, HF_HOME=str(run_dir / "hub"), **KEYS)  # pyright: ignore[reportArgumentType]
    return done, time.monotonic() - began


def test_a_store_that_never_answered_is_bad_input_within_seconds(tiny_corpus: TinyCorpus, tmp_path: Path):
    pytest.importorskip("s3fs", reason="s3fs is not installed")

    def look(name: str):
        more = [f"data.storage.s3.endpoint_url={NOWHERE}", "data.retry_budget=600"]
        more += ["data.source=datasets"] if name.startswith("data set") else []
        return start(tiny_corpus, tmp_path / name, PATHS[name], *more)

    with ThreadPoolExecutor(len(PATHS)) as pool:
        for name, (done, seconds) in zip(PATHS, pool.map(look, PATHS), strict=True):
            assert done.returncode == 78, (name, done.stderr)
            assert PATHS[name].rsplit("/", 1)[-1] in done.stderr, name
            assert "Traceback" not in done.stderr, name
            assert seconds < 25, "15 on an idle machine"
            assert not (tmp_path / name / "config.yaml").exists(), name


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_file_that_is_not_there_is_bad_input_at_once(tiny_corpus: TinyCorpus, tmp_path: Path, status: int):
    with serve(tmp_path) as server:
        server.failures, server.status = 1000, status
        done, _ = start(tiny_corpus, tmp_path / "run", f"{server.url}/a.json.gz")
    assert done.returncode == 78, done.stderr
    assert f"/a.json.gz: the server answers {status}" in done.stderr
    assert len(server.requests) < 4
    assert not (tmp_path / "run").exists()
