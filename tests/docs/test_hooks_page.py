"""The file and the commands of docs/hooks.md run as they are written, on a small run in place of the quickstart."""

from pathlib import Path

import pytest
from support.pages import DOCS, blocks, commands, run_command
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.observe.own_metrics import PREFIX, StepView
from stablelm.observe.sinks import last_records

PAGE = DOCS / "hooks.md"


@pytest.mark.slow
def test_the_commands_run_with_the_file_of_the_page(tiny_corpus: TinyCorpus, tmp_path: Path):
    (code,) = blocks(PAGE, "python")
    (tmp_path / "own.py").write_text(code)
    path = f"{REPOSITORY}:{tmp_path}"
    with_loss, with_metrics = commands(PAGE)
    short = ("train.steps=2",)
    for line in (
        with_loss,
        with_loss.replace("own:label_smoothing run.dir=runs/smoothed", "own:focal run.dir=runs/focal"),
    ):
        done = run_command(line, tmp_path, tiny_corpus, *short, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    done = run_command(with_metrics, tmp_path, tiny_corpus, *short, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for name in ("smoothed", "focal"):
        assert "objective" in last_records(tmp_path / "runs" / name / "metrics.jsonl")[2]
    found = last_records(tmp_path / "runs" / "norms" / "metrics.jsonl")[2]
    groups = ("embedding", "layers", "norm_final", "head")
    own = {f"{PREFIX}{kind}/{group}" for kind in ("weight", "gradient") for group in groups}
    assert own <= set(found) and all(found[name] > 0 for name in own)


def test_the_page_names_every_member_of_the_view():
    text = PAGE.read_text(encoding="utf-8")
    members = [name for name in {**StepView.__annotations__, **vars(StepView)} if not name.startswith("_")]
    assert len(members) == 9
    assert [name for name in members if f"`{name}`" not in text and f"`{name}(" not in text] == []
