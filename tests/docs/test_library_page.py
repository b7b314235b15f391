"""The Python of docs/library.md, run block after block as in a notebook; the first is a whole run in 15 lines."""

import json
import re
from pathlib import Path

import pytest
from support.pages import DOCS, blocks, run_code
from support.samples import REPOSITORY

BLOCKS = blocks(DOCS / "library.md", "python")


def test_a_run_takes_fifteen_lines():
    first = BLOCKS[0]
    assert len(first.strip().splitlines()) <= 15
    assert {"load_config", "train", "probe", "load_model", "score"} <= set(re.findall(r"stablelm\.(\w+)\(", first))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page was run, and what it printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    (REPOSITORY / "data" / "cache").mkdir(exist_ok=True)
    (folder / "data" / "cache").symlink_to(REPOSITORY / "data" / "cache")
    done = run_code("\n".join(BLOCKS), folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_page_runs(session: tuple[Path, str]):
    folder, said = session
    assert "nats, " in said and "did you mean train.steps?" in said
    assert "magneto 12\n" in said
    assert "75 run.stop_after 6\n" in said
    assert "torch.Size([1, 6, 128]) torch.Size([1, 6, 4096])\n" in said
    assert (folder / "exported/notebook/config.json").is_file()
    assert json.loads((folder / "runs/notebook/summary.json").read_text())["step"] == 10
