"""The page of a real run: made at its evaluations, after a resume, by the program, and for bad input."""

import re
from pathlib import Path

import pytest
from support.page_text import PageText
from support.programs import TINY, run
from support.tiny import TinyCorpus

from stablelm.observe.sinks import last_records

KEYS = (
    "train.steps=8",
    "evaluate.every=4",
    "observe.layers_every=2",
    "observe.page=true",
    "evaluate.samples=[bato de]",
)


@pytest.fixture(scope="module")
def finished(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PageText]]:
    """A run in two attempts on one and two processes, and the page that each of them left."""
    place, pages = tmp_path_factory.mktemp("report"), []
    for number, more in enumerate((["run.stop_after=5"], ["engine.kind=ddp"]), 1):
        arguments = [*TINY, *tiny_corpus.overrides(), *KEYS, *more, "run.dir=runs/two"]
        done = run("pretrain", *arguments, cwd=place, processes=number)
        assert done.returncode == (75 if number == 1 else 0), done.stderr
        assert "page:     runs/two/report.html" in done.stdout
        pages.append(PageText((place / "runs/two/report.html").read_text(encoding="utf-8")))
    return place / "runs/two", pages


def test_a_run_leaves_a_page_of_how_it_ended(finished: tuple[Path, list[PageText]]):
    _, (stopped, ended) = finished
    assert "stopped early" in stopped.text and "Set a larger run.stop_after" in stopped.text
    assert "62% of 8" in stopped.text and "100% of 8" in ended.text
    assert (
        "finished" in ended.text
        and "Attempt 2 began; step 5 had been reached, on 2 processes instead of 1" in ended.text
    )


def test_it_has_the_figures_of_the_records(finished: tuple[Path, list[PageText]]):
    folder, (_, page) = finished
    records = last_records(folder / "metrics.jsonl")
    for value in (records[8]["loss"], records[8]["val_loss/default"], records[8]["val_bits_per_byte/default"]):
        assert f"{value:.4f}" in page.text
    last = records[8]
    for name in ("layer/0003/stream_rms", "layer/0001/token_correlation", "attention/0002/entropy"):
        assert f"{last[name]:.4g}" in page.text, name
    assert last["samples"][0]["prompt"] in page.text
    assert sum(tag == "image" for tag, _ in page.tags) == 10
    assert "launch/pretrain.py" in page.text and "n_layers: 3" in page.text


def test_the_program_makes_the_same_page(finished: tuple[Path, list[PageText]], tmp_path: Path):
    folder, (_, page) = finished
    done = run("report", str(folder), "--out", str(tmp_path / "page.html"))
    assert done.returncode == 0 and re.fullmatch(r".*page\.html \(\d\.\d MiB\)\n", done.stdout), done
    made = PageText((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert made.text.partition("Made by")[0] == page.text.partition("Made by")[0]


def test_without_the_key_there_is_no_page(tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = [*TINY, *tiny_corpus.overrides(), "train.steps=1", "observe.page=false", "run.dir=quiet"]
    done = run("pretrain", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "report.html" not in done.stdout
    assert not (tmp_path / "quiet/report.html").exists()


def test_a_run_that_diverges_leaves_a_page_that_says_so(tiny_corpus: TinyCorpus, tmp_path: Path):
    bad = ["guards.max_skips=0", "faults.allow=true", "faults.bad_batch=3", "observe.page=true", "run.dir=bad"]
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), *bad, cwd=tmp_path)
    assert done.returncode == 76, done.stderr
    page = PageText((tmp_path / "bad/report.html").read_text(encoding="utf-8"))
    assert "diverged" in page.text and "updates in a row were skipped" in page.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist; name the directory of a run"),
        (["."], "is not the directory of a run: it has no metrics.jsonl, summary.json or config.yaml; name a run.dir"),
        (["run", "--out", "no/folder/page.html"], "--out no/folder/page.html: its folder does not exist"),
        (["run", "--out", "run"], "--out run is a directory; name a file"),
        (["blocked"], "blocked/report.html may not be written by this user; name another file by --out"),
        ([], "required: RUN_DIR"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, tmp_path: Path):
    for name in ("run", "blocked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "blocked" / "report.html").mkdir()
    done = run("report", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
