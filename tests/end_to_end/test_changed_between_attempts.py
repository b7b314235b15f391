"""Text that is exchanged between two attempts of a run is found, wherever it lies."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.httpserver import serve
from support.programs import TINY, run, summary
from support.tiny import TinyCorpus


def train(corpus: TinyCorpus, path: object, run_dir: Path, *extra: str):
    settings = ("data.retry_budget=1", "train.steps=6", f"data.path={path}", f"run.dir={run_dir}")
    return run("pretrain", *TINY, *corpus.overrides(), *settings, *extra)


def other_words(content: bytes) -> bytes:
    """Another text of as many rows and, as a copy that is padded, of the same size."""
    text = gzip.decompress(content)
    changed = gzip.compress(text.replace(b"ba", b"ab", 3), mtime=0)
    return changed + bytes(max(0, len(content) - len(changed)))


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "other words": other_words,
    "longer": lambda content: content + gzip.compress(b'{"text": "one more"}\n'),
}


@pytest.mark.parametrize("where", ["http", "local"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_text_that_changed_between_attempts(tiny_corpus: TinyCorpus, tmp_path: Path, where: str, change):
    folder, run_dir = tmp_path / "text", tmp_path / "run"
    shutil.copytree(Path(tiny_corpus.train).parent, folder)
    first = sorted(folder.iterdir())[0]
    intact, workers = first.read_bytes(), "data.workers=2"
    with serve(folder) as server:
        server.tags = True
        names = "tiny-train.{00000..00003}-of-00004.json.gz"
        path = f"{server.url}/{names}" if where == "http" else folder / names
        stopped = train(tiny_corpus, path, run_dir, workers, "data.worker_kind=process", "run.stop_after=3")
        assert stopped.returncode == 75, stopped.stderr

        first.write_bytes(change(intact))
        second = train(tiny_corpus, path, run_dir)
        assert second.returncode == 77, second.stderr
        assert f"{first.name}: changed" in summary(run_dir)["reason"]
        assert "since an earlier attempt of this run" in summary(run_dir)["reason"]

        first.write_bytes(intact)  # a copy: its time of change is another one
        third = train(tiny_corpus, path, run_dir)
    assert third.returncode == 0, third.stderr
    assert len(list((run_dir / "data_seen").iterdir())) < 4, "each attempt gathers what those before it noted"


def test_a_damaged_file_may_be_replaced_by_an_intact_copy(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder, run_dir = tmp_path / "text", tmp_path / "run"
    shutil.copytree(Path(tiny_corpus.train).parent, folder)
    files = sorted(folder.iterdir())
    intact = files[1].read_bytes()
    with serve(folder) as server:
        path = f"{server.url}/tiny-train.{{00000..00003}}-of-00004.json.gz"
        files[1].write_bytes(intact[:-200])  # of remote files the first and the last are looked at before the start
        cut = train(tiny_corpus, path, run_dir)
        assert (cut.returncode, "truncated" in cut.stderr) == (77, True), cut.stderr
        files[1].write_bytes(intact)
        done = train(tiny_corpus, path, run_dir)
    assert done.returncode == 0, done.stderr
