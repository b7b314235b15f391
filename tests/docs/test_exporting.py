"""The commands of docs/exporting.md do what the page says."""

import shlex
from pathlib import Path

import pytest
from support.exported import save_run
from support.programs import run
from support.tiny import TinyCorpus
from support.uploadhub import TOKEN, UploadHub
from test_commands import ROOT, commands

PAGE = ROOT / "docs" / "exporting.md"
COMMANDS = [command for command in commands(PAGE) if "launch/export.py" in command]
SHAPE = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.method=deepscalelm_pre")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_exports_or_refuses(command: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    save_run(tmp_path / "run", tiny_corpus.tokenizer, *SHAPE, "model.norm=rmsnorm", "model.activation=swiglu")
    places = {"runs/deep": tmp_path / "run", "exported": tmp_path, "data/mine.jsonl": Path(tiny_corpus.validation)}
    for place, here in places.items():
        command = command.replace(place, str(here))
    with UploadHub() as hub:
        done = run("export", *shlex.split(command)[2:], HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    refused = "--format gpt2" in command
    assert done.returncode == (78 if refused else 0), done.stderr
    assert ("model.activation=swiglu has a gate" in done.stderr) == refused
    assert ("in 0 of 60 documents" in done.stdout) == ("--check-tokenizer" in command)
    assert ("OWNER/NAME" in hub.repositories) == ("--push" in command)


def test_the_page_has_commands():
    assert len(COMMANDS) == 4
