"""The commands of docs/optimizers.md, one after the other, with smaller numbers."""

from pathlib import Path

import pytest
from support.pages import DOCS, commands, run_command
from support.programs import summary
from support.tiny import TinyCorpus

PAGE = DOCS / "optimizers.md"
SMALLER = {
    "power_after=100": "power_after=2",
    "24x512x2x512 --compile": "1x64x1x16",
    "--rounds 20": "--rounds 1",
    "docs/figures/methods/": "",
}


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tiny_corpus: TinyCorpus, tmp_path: Path):
    losses = []
    for line in commands(PAGE):
        if "make_method_tables" in line:
            continue  # it writes the page itself: test_method_tables.py
        done = run_command(line, tmp_path, tiny_corpus, "train.steps=4", here=SMALLER)
        assert done.returncode == 0, (line, done.stderr)
        if "eval.py" in line:
            losses.append(done.stdout)
    assert losses[0] != losses[1]
    assert {summary(folder)["step"] for folder in (tmp_path / "runs").iterdir()} == {4}
    assert (tmp_path / "exported" / "config.json").is_file()
    assert (tmp_path / "optimizer-costs.json").is_file()
