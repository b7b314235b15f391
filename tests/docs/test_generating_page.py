"""The commands and the code of docs/generating.md, run on a small model."""

import json
from pathlib import Path

import pytest
from support.pages import DOCS, blocks, commands, run_code, run_command
from support.programs import TINY, run
from support.tiny import TinyCorpus

from stablelm.observe.sinks import read_metrics

PAGE = DOCS / "generating.md"
QUICK = ("train.steps=2", "evaluate.every=1")
LINES = [line for line in commands(PAGE) if "benchmarks/" not in line]


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page assumes it: a run in runs/quickstart and two files of prompts."""
    place = tmp_path_factory.mktemp("page")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), "train.steps=3", "run.dir=runs/quickstart", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "prompts.txt").write_text("bato de\nfin\n")
    (place / "prompts.jsonl").write_text('{"prompt": "bato de"}\n{"prompt": "fin"}\n')
    return place


@pytest.mark.parametrize("line", LINES)
def test_a_command_does_what_the_page_says(line: str, folder: Path, tiny_corpus: TinyCorpus):
    (folder / "texts.jsonl").unlink(missing_ok=True)
    done = run_command(line, folder, tiny_corpus, *QUICK)
    assert done.returncode == 0, done.stderr
    if "--out" in line:
        keys = {"prompt", "sample", "text", "new_tokens", "ended"}
        records = [json.loads(record) for record in (folder / "texts.jsonl").read_text().splitlines()]
        assert records and all(set(record) == keys for record in records)
    if "launch/pretrain.py" in line:
        records = read_metrics(folder / "runs/sampled/metrics.jsonl")
        samples = [record["samples"] for record in records if "samples" in record]
        assert [[each["prompt"] for each in texts] for texts in samples] == [["The function returns", "A list is"]] * 2


def test_the_code_runs(folder: Path):
    (code,) = blocks(PAGE, "python")
    done = run_code(f"{code}\nprint(len(texts))", folder)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
