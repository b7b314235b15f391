"""Validation windows against a naive concatenation, and the unigram floor against its formula."""

import math
from collections import Counter

import pytest
import torch
from support.letters import LetterTokenizer, write_rows

from stablelm.data.storage.options import ReadOptions
from stablelm.data.validation import read, unigram_cross_entropy
from stablelm.errors import DataError
from stablelm.model.targets import IGNORED

TEXTS = {"b.json": ["abc", "", "dé"], "a.json.gz": ["fghij", "k"]}
STREAM = [ord(letter) for letter in "fghij\0k\0abc\0dé\0"]


@pytest.fixture
def files(tmp_path):
    return [write_rows(tmp_path / name, texts) for name, texts in TEXTS.items()]


AT_ONCE = ReadOptions(retry_budget=0)


def read_set(files, seq_len, sequences):
    return read(files, LetterTokenizer(), seq_len=seq_len, sequences=sequences, options=AT_ONCE)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 7, 15, 16, 40])
def test_windows_cover_the_corpus_in_base_name_order(files, seq_len):
    found = read_set(files, seq_len, 1000)
    count = math.ceil((len(STREAM) - 1) / seq_len)
    assert found.tokens.shape == found.targets.shape == (count, seq_len)
    assert found.tokens.dtype == found.targets.dtype == torch.int64
    valid = found.targets != IGNORED
    assert found.targets[valid].tolist() == STREAM[1:]
    assert found.tokens[valid].tolist() == STREAM[:-1]
    assert not valid[:-1].logical_not().any(), "padding is in the last window only"
    assert found.documents == 4
    assert found.bytes_per_token == len("fghijkabcdé".encode()) / len(STREAM)


def test_at_most_the_asked_windows_and_the_touched_documents(files):
    found = read_set(files, 3, 2)
    assert found.tokens.tolist() == [STREAM[:3], STREAM[3:6]]
    assert found.targets.tolist() == [STREAM[1:4], STREAM[4:7]]
    assert found.documents == 2
    assert found.bytes_per_token == len("fghijk") / 8
    assert read_set(files, 5, 1).documents == 1


def test_a_set_without_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"empty\.json'?: no text to predict"):
        read_set([write_rows(tmp_path / "empty.json", [])], 4, 2)


@pytest.mark.parametrize("tokens", [1, 4, 9, 1000])
def test_unigram_is_add_one_over_the_first_tokens(files, tokens):
    validation = read_set(files, 5, 2)
    counts = Counter(STREAM[:tokens])
    total = min(tokens, len(STREAM)) + 300
    expected = -sum(math.log((counts[token] + 1) / total) for token in STREAM[1:11]) / 10
    found = unigram_cross_entropy({"": files}, LetterTokenizer(), validation, vocab=300, tokens=tokens, options=AT_ONCE)
    assert found == pytest.approx(expected, rel=1e-12)


def test_unigram_leaves_padding_out(files):
    whole = read_set(files, 40, 1)
    exact = read_set(files, len(STREAM) - 1, 1)
    scores = [
        unigram_cross_entropy({"": files}, LetterTokenizer(), each, vocab=300, tokens=100, options=AT_ONCE)
        for each in (whole, exact)
    ]
    assert scores[0] == scores[1]
