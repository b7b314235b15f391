"""data/preview.py: figures of known documents, borders where they are, the same for text and shards."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.letters import write_rows
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.data.loader import Batch
from stablelm.data.preview import page, prepare, preview, statistics
from stablelm.data.shards import shard_format
from stablelm.tokenizers import load_tokenizer, training
from stablelm.tokenizers.interface import document_tokens

PROGRAM = REPOSITORY / "data" / "preview.py"
WORDS = ["lane", "token", "layer", "stream", "norm", "head", "depth", "width", "batch", "epoch"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True)


def show(*words: str) -> str:
    """What the program prints, without the start of a process."""
    out = io.StringIO()
    found = prepare(load([], list(words)))
    preview(*found, documents=60, sequences=2, console=Console(file=out, width=120, highlight=False))
    return out.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    lines = [" ".join(WORDS[(n * k) % 10] for k in range(20)) for n in range(400)]
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(training.train(lines, vocab_size=285))
    return str(path)


def test_statistics_of_known_documents(model):
    encoder = load_tokenizer(model)
    texts = ["lane", "lane token", "", "ü" * 9]
    documents = [(document_tokens(encoder, text), text) for text in texts]
    lengths = [len(tokens) for tokens, _ in documents]
    found = statistics([*documents, (np.array([encoder.unknown, encoder.eos]), "?")], encoder)
    assert (found.documents, found.tokens, found.longest) == (5, sum(lengths) + 2, max(lengths))
    assert found.mean == pytest.approx((sum(lengths) + 2) / 5)
    assert found.median == np.median([*lengths, 2])
    assert found.bytes_per_token == pytest.approx((4 + 10 + 18 + 1) / found.tokens)
    assert found.unknown == pytest.approx(1 / found.tokens)


def test_a_page_marks_where_documents_begin_and_end(model):
    encoder = load_tokenizer(model)
    parts = [encoder.encode("lane"), encoder.encode("token")]
    tokens = torch.tensor([[*parts[0], encoder.eos, *parts[1], encoder.eos, encoder.eos, encoder.eos]])
    numbers = torch.tensor([[0] * (len(parts[0]) + 1) + [1] * (len(parts[1]) + 1) + [2, 2]])
    assert page(Batch(tokens, tokens, 0, numbers), 0, encoder).plain == "lane⏹◆token⏹ ░2"


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_text_and_shards_show_the_same(model, tmp_path, packing):
    texts = [" ".join(WORDS[(n * k) % 10] for k in range(3 + n % 9)) for n in range(60)]
    source = Path(write_rows(tmp_path / "a.jsonl", texts))
    encoder = load_tokenizer(model)
    (tmp_path / "shards").mkdir()
    with (tmp_path / "shards" / "a.jsonl.tokens").open("wb") as file:
        rows = ((document_tokens(encoder, text), len(text)) for text in texts)
        named = {"source": "a.jsonl", "source_size": 1, "tokenizer": encoder.sha256}
        shard_format.write(file, rows, **named, pieces=encoder.pieces, eos=encoder.eos)
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps({"files": [{"name": "a.jsonl"}]}))
    common = [f"data={{tokenizer: {model}, lanes: 4, seq_len: 20, packing: {packing}}}"]
    text = show(*common, f"data.path={source}")
    assert "documents            │ 60" in text and "◆" in text and "sequence 1" in text
    assert ("padding  " in text) == (packing == "best_fit")
    assert show(*common, "data.source=shards", f"data.path={tmp_path}/shards") == text


def test_mistakes_are_told_and_help_is_quick(model):
    wrong = call("data.path=none.json", f"data.tokenizer={model}")
    assert wrong.returncode == 78 and "data.path: 'none.json' does not exist" in wrong.stderr
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert "--sequences" in call("--help").stdout
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5
