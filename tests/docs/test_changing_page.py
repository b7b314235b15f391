"""The commands of docs/changing_a_run.md, one after the other, with smaller numbers."""

import json
from pathlib import Path

import pytest
from support.pages import DOCS, commands, run_command
from support.programs import summary
from support.tiny import TinyCorpus

PAGE = DOCS / "changing_a_run.md"
SMALLER = {
    "stop_after=100": "stop_after=2",
    "stop_after=200": "stop_after=4",
    "{0: 16, 200: 32}": "{0: 12, 2: 24}",
    "train.steps=900": "train.steps=8",
    "step-00000825": "step-00000007",
    "model.n_layers=48": "model.n_layers=5",
}


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tiny_corpus: TinyCorpus, tmp_path: Path):
    told = []
    for line in commands(PAGE):
        length = () if "train.steps" in line else ("train.steps=6",)
        done = run_command(
            line, tmp_path, tiny_corpus, "checkpoint.every=1", "checkpoint.keep=9", *length, here=SMALLER
        )
        assert done.returncode == (75 if "stop_after" in line else 0), (line, done.stderr)
        told.append(done.stdout)
    assert "changed after step 4: train.lr 0.0003 -> 0.001" in told[3]
    assert "changed after step 6: train.steps 6 -> 8" in told[4]
    assert summary(tmp_path / "runs" / "ramp")["tokens"] == 32 * (2 * 12 + 6 * 24)
    branch = json.loads((tmp_path / "runs" / "branch" / "identity.json").read_text())
    assert [segment["step"] for segment in branch["run.segments"]] == [6, 7]
