"""The commands of docs/watching.md about the page of a run, run on a small model."""

from pathlib import Path

import pytest
from support.pages import DOCS, commands, run_command
from support.programs import TINY, run
from support.tiny import TinyCorpus


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in runs/quickstart."""
    place = tmp_path_factory.mktemp("page")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), "train.steps=2", "run.dir=runs/quickstart", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("line", [line for line in commands(DOCS / "watching.md") if "launch/report.py" in line])
def test_a_command_makes_the_page(line: str, folder: Path, tiny_corpus: TinyCorpus):
    page = folder / ("page.html" if "--out" in line else "runs/quickstart/report.html")
    done = run_command(line, folder, tiny_corpus)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in page.read_text(encoding="utf-8")
