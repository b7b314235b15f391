"""A run on text of a web server: what is bad before the start is refused, an outage ends it where it can go on."""

import gzip
from pathlib import Path

import pytest
from support.httpserver import serve
from support.programs import TINY, losses, run, summary
from support.tiny import TinyCorpus, synthetic_documents, write_documents

FILES, STEPS = 60, 40
NAMES = f"away-train.{{00000..{FILES - 1:05d}}}.json.gz"


def text(folder: Path) -> Path:
    """Small files, several for each lane, so that a run asks for the next ones all the time."""
    folder.mkdir()
    for index in range(FILES):
        write_documents(folder / f"away-train.{index:05d}.json.gz", synthetic_documents(6, seed=index))
    return folder


def arguments(corpus: TinyCorpus, path: object, run_dir: Path, *extra: str) -> list[str]:
    settings = (
        f"train.steps={STEPS}",
        "checkpoint.every=4",
        "data.workers=0",
        "data.prefetch=1",
        "data.retry_budget=1",
    )
    return [*TINY, *corpus.overrides(), f"data.path={path}", f"run.dir={run_dir}", *settings, *extra]


@pytest.mark.slow
def test_a_server_that_is_away_for_longer_than_the_budget(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder, cut = text(tmp_path / "text"), tmp_path / "cut"
    whole = run("pretrain", *arguments(tiny_corpus, folder / NAMES, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    with serve(folder) as server:

        def goes_away_after_a_commit(request: str) -> None:
            server.down = server.down or any((cut / "checkpoints").glob("step-*/COMMITTED"))

        server.before = goes_away_after_a_commit
        line = arguments(tiny_corpus, f"{server.url}/{NAMES}", cut)
        first = run("pretrain", *line)
        assert first.returncode == 77, first.stderr
        assert first.stderr.count("error: ") == 1
        assert "Traceback" not in first.stderr
        told = summary(cut)
        assert told["exit_code"] == 77
        assert f"{server.url}/away-train.000" in told["reason"]
        assert "data.retry_budget" in told["reason"]
        assert 0 < told["checkpointed_step"] < STEPS
        committed = cut / "checkpoints" / f"step-{told['checkpointed_step']:08d}" / "COMMITTED"
        assert committed.exists()

        still_away = run("pretrain", *line)
        assert still_away.returncode == 77, "an outage is no bad input, also when it lasts until the next start"
        assert committed.exists()

        server.before, server.down = None, False
        second = run("pretrain", *line)
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout
    assert sorted(losses(cut)) == list(range(1, STEPS + 1))
    assert losses(cut) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("missing", ["data.path", "away-train.00059.json.gz", "404"]),
        ("plain", ["data.path", "away-train.00059.json.gz", "gzip"]),
        ("truncated", ["data.path", "away-train.00059.json.gz", "truncated"]),
        ("validation", ["data.validation.default", "other.json.gz", "404"]),
    ],
)
def test_text_that_is_bad_before_the_start(harm: str, words: list[str], tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = text(tmp_path / "text")
    last = folder / f"away-train.{FILES - 1:05d}.json.gz"
    content = last.read_bytes()
    if harm == "missing":
        last.unlink()
    elif harm == "plain":
        last.write_bytes(gzip.decompress(content))
    elif harm == "truncated":
        last.write_bytes(content[:-200])
    with serve(folder) as server:
        extra = [f"data.validation_path={server.url}/other.json.gz"] if harm == "validation" else []
        done = run("pretrain", *arguments(tiny_corpus, f"{server.url}/{NAMES}", tmp_path / "run", *extra))
    assert done.returncode == 78, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()
