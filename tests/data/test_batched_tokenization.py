"""Byte-level BPE in the loader: the same batches from threads and processes, after a resume, and from shards."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import tokenizer_files
from support.letters import write_rows
from support.tokenizer_files import AWKWARD, TEXT

from stablelm.config.schema import DataConfig
from stablelm.data import validation
from stablelm.data.loader import Loader
from stablelm.data.prepare_shards import PrepareRequest, prepare
from stablelm.data.shards.row_filters import RowFilters
from stablelm.data.shards.shard_format import OutputFolder
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError
from stablelm.tokenizers import Tokenizer, load_tokenizer

LANES = 4
CONFIG = DataConfig(seq_len=24, lanes=LANES, workers=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tokenizer_files.write(tmp_path_factory.mktemp("llama3"), tokenizer_files.llama3())
    return load_tokenizer(folder, add_bos=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    texts = [f"{file}.{row} {TEXT[row % 3]} {AWKWARD * (row % 2)}" for file in range(3) for row in range(24)]
    return [write_rows(folder / f"part-{n}.json.gz", texts[n::3]) for n in range(3)]


def batches(files: list[str], tokenizer: Tokenizer, config: DataConfig, count: int, state: Any = None) -> list[Any]:
    loader = Loader(files, tokenizer, config, seed=3, global_batch_size=LANES)
    if state:
        loader.load(state)
    made = [loader.next().tokens.tolist() for _ in range(count)]
    end = loader.state()
    loader.close()
    return [*made, end]


@pytest.mark.parametrize(
    "change",
    [{"workers": 1}, {"workers": 3}, {"workers": 2, "worker_kind": "process"}],
    ids=["a thread", "threads", "processes"],
)
def test_workers_of_both_kinds_make_the_same_batches_also_after_a_resume(
    change: dict, tokenizer: Tokenizer, files: list[str], capfd: pytest.CaptureFixture[str]
):
    *expected, _ = batches(files, tokenizer, CONFIG, 12)
    config = replace(CONFIG, **change)
    *first, state = batches(files, tokenizer, config, 5)
    *second, _ = batches(files, tokenizer, config, 7, state)
    assert first + second == expected
    assert "fork" not in capfd.readouterr().err


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_document_begins_and_ends_with_its_tokens(packing: Any, tokenizer: Tokenizer, files: list[str]):
    *made, _ = batches(files, tokenizer, replace(CONFIG, packing=packing, seq_len=400), 3)
    for row in (row for batch in made for row in batch):
        after = [b for a, b in pairwise(row) if a == tokenizer.eos]
        # Behind the last document of a window that best_fit fills is padding.
        assert set(after) <= {tokenizer.bos, tokenizer.eos} and tokenizer.bos in after


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_shards_hold_the_same_tokens(workers: int, tokenizer: Tokenizer, files: list[str], tmp_path: Path):
    out = OutputFolder(str(tmp_path / "shards"))
    out.create("--out")
    none = RowFilters(None, None, None, 0.8)
    prepare(PrepareRequest(files, tokenizer, out, none, workers, None, False, ReadOptions()), lambda line: None)
    shards = sorted(map(str, (tmp_path / "shards").glob("*.tokens")))
    *from_text, _ = batches(files, tokenizer, CONFIG, 6)
    *from_shards, _ = batches(shards, tokenizer, CONFIG, 6)
    assert from_shards == from_text
    plain = load_tokenizer(tokenizer_files.write(tmp_path / "plain", tokenizer_files.llama3()))
    with pytest.raises(DataError, match="made with another tokenizer"):
        batches(shards, plain, CONFIG, 1)


def test_validation_text_has_bytes_per_token_where_it_comes_back(tokenizer: Tokenizer, tmp_path: Path):
    path = write_rows(tmp_path / "a.json", [AWKWARD, *TEXT[:3]])
    lossy = load_tokenizer(tokenizer_files.write(tmp_path / "words", tokenizer_files.word_piece()), eos_token="[SEP]")
    size = sum(len(text.encode()) for text in [AWKWARD, *TEXT[:3]])
    read = {
        each.pieces: validation.read([path], each, seq_len=16, sequences=999, options=ReadOptions())
        for each in (tokenizer, lossy)
    }
    tokens = sum(len(array) for array in tokenizer.encode_arrays([AWKWARD, *TEXT[:3]]))
    assert read[tokenizer.pieces].bytes_per_token == pytest.approx(size / tokens)
    assert read[lossy.pieces].bytes_per_token is None
