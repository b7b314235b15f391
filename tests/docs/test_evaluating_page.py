"""The commands of docs/evaluating.md run as they are written, on a small run in place of the quickstart."""

from pathlib import Path

import pytest
from support.choices import write_items
from support.pages import DOCS, blocks, commands, run_command
from support.programs import TINY, run
from support.tiny import TinyCorpus

PAGE = DOCS / "evaluating.md"
FROM_THE_HUB = ("hellaswag", "mmlu")
SHORT = ("train.steps=4", "evaluate.every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: TinyCorpus) -> Path:
    """A folder with the files that the page names."""
    folder = tmp_path_factory.mktemp("page")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), "train.steps=2", "run.dir=runs/quickstart", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "news.txt").write_text("ban der fi gosta. " * 40)
    (folder / "tasks").mkdir()
    (definition,) = blocks(PAGE, "yaml")
    (folder / "tasks" / "words.yaml").write_text(definition)
    for name in ("piqa", "arc_easy", "words"):
        write_items(folder / f"{name}.jsonl", 6)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", [pytest.param(one, id=one[:70]) for one in commands(PAGE)])
def test_a_command_runs(line: str, place: Path, tiny_corpus: TinyCorpus):
    if any(name in line for name in FROM_THE_HUB):
        pytest.skip("its data are on the hub; test_commands.py checks its options")
    if "runs/kept" in line and "pretrain" not in line and not (place / "runs" / "kept").exists():
        kept = next(one for one in commands(PAGE) if "run.dir=runs/kept" in one)
        assert run_command(kept, place, tiny_corpus, *SHORT).returncode == 0
    done = run_command(line, place, tiny_corpus, *SHORT)
    assert done.returncode == 0, done.stderr
