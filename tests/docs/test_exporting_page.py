"""The commands and the code of docs/exporting.md and docs/gguf.md do what the pages say, on a small model."""

import shutil
from pathlib import Path

import pytest
from support.pages import DOCS, blocks, commands, run_code, run_command
from support.tiny import TinyCorpus
from support.uploadhub import TOKEN, UploadHub

PAGE = DOCS / "exporting.md"
TRAINING, *EXPORTS = commands(PAGE)
WRITTEN = {"--format hf": "modeling_stablelm.py", "--format gguf": "model.gguf"}


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's training command was run."""
    place = tmp_path_factory.mktemp("page")
    done = run_command(TRAINING, place, tiny_corpus, "train.steps=2")
    assert done.returncode == 0, done.stderr
    (place / "news.txt").write_text("ban der fi gosta.")
    return place


@pytest.mark.parametrize("line", [*EXPORTS, *commands(DOCS / "gguf.md")])
def test_a_command_exports_or_refuses(line: str, folder: Path, tiny_corpus: TinyCorpus):
    out = folder / line.partition("--out ")[2].split()[0]
    shutil.rmtree(out, ignore_errors=True)
    with UploadHub() as hub:
        done = run_command(line, folder, tiny_corpus, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    refused = "--format gpt2" in line
    assert done.returncode == (78 if refused else 0), done.stderr
    assert ("model.activation=swiglu has a gate" in done.stderr) == refused
    assert out.exists() != refused
    assert ("in 0 of 1 documents" in done.stdout) == ("--check-tokenizer" in line)
    assert ("OWNER/NAME" in hub.repositories) == ("--push" in line)
    for asked, file in WRITTEN.items():
        assert (out / file).exists() == (asked in line)


@pytest.mark.parametrize("code", blocks(PAGE, "python"), ids=["standard", "hf"])
def test_the_code_loads_what_was_exported(code: str, folder: Path, tiny_corpus: TinyCorpus):
    export = next(line for line in EXPORTS if line.partition("--out ")[2].split()[0] in code)
    if not (folder / export.partition("--out ")[2].split()[0]).exists():
        assert run_command(export, folder, tiny_corpus).returncode == 0
    done = run_code(f"{code}\nprint(type(model).__name__, len(tokenizer('ban der').input_ids) > 1)", folder)
    assert done.returncode == 0, done.stderr
    named = "StablelmDecoderForCausalLM" if "trust_remote_code" in code else "LlamaForCausalLM"
    assert done.stdout.splitlines()[-1].split() == [named, "True"]
