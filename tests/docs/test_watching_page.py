"""The commands of docs/watching.md, run on a small model."""

import importlib.util
from pathlib import Path

import pytest
from support.pages import DOCS, commands, run_command
from support.programs import TINY, run
from support.tiny import TinyCorpus

PAGE = DOCS / "watching.md"
LINES = [line for line in commands(PAGE) if "launch/pretrain.py" in line]


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in runs/quickstart."""
    place = tmp_path_factory.mktemp("page")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), "train.steps=2", "run.dir=runs/quickstart", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("line", [line for line in commands(PAGE) if "launch/report.py" in line])
def test_a_command_makes_the_page(line: str, folder: Path, tiny_corpus: TinyCorpus):
    page = folder / ("page.html" if "--out" in line else "runs/quickstart/report.html")
    done = run_command(line, folder, tiny_corpus)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", LINES)
def test_a_command_does_what_the_page_says(
    line: str, tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    line = line.removeprefix("WANDB_MODE=offline ")
    done = run_command(line, tmp_path, tiny_corpus, "train.steps=2", "run.dir=runs/watched", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "watched"
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (run_dir / "tensorboard").is_dir() == ("tensorboard" in line)


def test_the_page_names_every_logger_and_group():
    from stablelm.config.keys import keys
    from stablelm.observe.sinks.tensorboard_sink import GROUPS

    text = PAGE.read_text(encoding="utf-8")
    (kind,) = keys()["observe.sinks"].type.__args__
    assert all(f"| `{name}`" in text for name in kind.__args__)
    assert all(f"`{group}`" in text for group in GROUPS)
