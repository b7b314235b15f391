"""The commands of docs/tokenizers.md, with a small tokenizer.json in a folder and on a stand-in of the hub."""

import json
from pathlib import Path

import pytest
import yaml
from support import tokenizer_files
from support.fakehub import FakeHub
from support.pages import DOCS, commands, run_command
from support.tiny import TinyCorpus, synthetic_documents, write_documents

from stablelm.tokenizers import load_tokenizer

LINES = commands(DOCS / "tokenizers.md")
TRAINING = [line for line in LINES if "launch/pretrain.py" in line]
MAKING = [line for line in LINES if "train_tokenizer.py" in line]
MEASURING = [line for line in LINES if "benchmarks/" in line]


def test_every_command_is_one_of_these():
    assert len(LINES) == len(TRAINING) + len(MAKING) + len(MEASURING) and all((TRAINING, MAKING, MEASURING))


@pytest.mark.parametrize("line", TRAINING)
def test_a_run_takes_the_tokenizer(line: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    content = tokenizer_files.llama3()
    tokenizer_files.write(tmp_path / "llama", content, tokenizer_config={
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
    })  # fmt: skip
    here = {"/models/llama": str(tmp_path / "llama")}
    files = {"tokenizer.json": tokenizer_files.gpt2()}
    with FakeHub(files, name="openai-community/gpt2", kind="models") as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = run_command(line, tmp_path, tiny_corpus, "train.steps=1", here=here, **own)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    asked = "data.add_bos=true" in line
    assert (run / "tokenizer.json").read_bytes() == (content if asked else files["tokenizer.json"])
    assert yaml.safe_load((run / "resolved.yaml").read_text())["data"]["add_bos"] == asked


@pytest.mark.parametrize("line", MAKING)
def test_a_tokenizer_is_made(line: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in synthetic_documents(60, seed=0)))
    here = {"--source embedded": f"--source {texts}", "--vocab-size 4096": "--vocab-size 300"}
    done = run_command(line, tmp_path, tiny_corpus, here=here)
    assert done.returncode == 0, done.stderr
    made = load_tokenizer(tmp_path / line.partition("--out ")[2])
    text = " ban\n\nder  ☃"
    assert made.decode(made.encode(text)) == text and made.pieces == 300


@pytest.mark.slow
@pytest.mark.parametrize("line", MEASURING)
def test_the_measurement_prints_ratios(line: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    tokenizer_files.write(tmp_path, tokenizer_files.byte_level())
    (tmp_path / "mine").mkdir()
    write_documents(tmp_path / "mine" / "a.json.gz", synthetic_documents(30, seed=1))
    here = {"/data/mine": str(tmp_path / "mine")}
    done = run_command(f"{line} --megabytes 1 --files 2 --rounds 1", tmp_path, tiny_corpus, here=here)
    assert done.returncode == 0, done.stderr
    assert "loader" in done.stdout
