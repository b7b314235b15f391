"""A SentencePiece model written as tokenizer.json gives the ids and the text that SentencePiece gives."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from support.samples import shared_data
from support.tiny import TinyCorpus, synthetic_documents

from stablelm.errors import ConfigError
from stablelm.export.tokenizer_json import from_sentencepiece
from stablelm.tokenizers.training import sample_lines, train

ODD = [
    *("", " ", "  ", "\n", " a  b ", "\t\ttab\r\nline  \n\n  x", "\x00\x01\x7f", "\ufeffmark", "x" * 3000, " " * 500),
    *(
        "a</s>b <unk> <0x0A> <s> <pad>",
        "<0x41>",
        "</s>",
        "<",
        ">",
        "<<0x41>>",
        "a <unk",
        "\u2581 x\u3000y \u2581\u2581",
    ),
    *("\u00e9 e\u0301 \ufb01 \u00c5 \u00bd \u2460", "\U0001f600\U0001f44d\U0001f3fd \u200d", "\u65e5\u672c\u8a9e"),
    *("\u0915\u094d\u0937\u093f", "a\u00a0b", "\u00ad\u2028", "\u0958\u0344", "\uff41\uff42"),
]


@cache
def c4() -> list[str]:
    found = []
    for path in sorted(shared_data("c4/en").glob("*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"] for line in lines]
    return found


def both(content: bytes) -> tuple[sentencepiece.SentencePieceProcessor, tokenizers.Tokenizer]:
    library = tokenizers.Tokenizer.from_str(from_sentencepiece(content))
    library.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_proto=content), library


def differing(content: bytes, texts: list[str]) -> list[str]:
    own, library = both(content)
    return [text for text in texts if own.encode(text) != library.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", ["t5-32k-unigram.model", "mistral-v1-32k-bpe.model"])
def test_public_models_give_the_same_ids_on_c4_and_on_odd_text(name: str):
    content = shared_data(f"tokenizers/{name}").read_bytes()
    assert differing(content, [*c4()[::8], *ODD]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-32k-unigram.model", "mistral-v1-32k-bpe.model"])
def test_public_models_give_the_same_ids_on_all_of_the_sample(name: str):
    assert differing(shared_data(f"tokenizers/{name}").read_bytes(), c4()) == []


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_our_own_models_give_the_same_ids(kind: str):
    lines = sample_lines(synthetic_documents(60, seed=0), 5000, 0)
    content = train([*lines, "Zwei  Wörter,   drei\tWörter."], vocab_size=300, model_type=kind)
    assert differing(content, [*synthetic_documents(40, seed=5), *ODD]) == []


@pytest.mark.slow
def test_a_unigram_model_of_c4_differs_in_hardly_any_document():
    """SentencePiece adds scores in single precision, so that in long texts it takes the worse of two near equals."""
    content = train(sample_lines(c4()[:400], 20000, 0), vocab_size=8000, model_type="unigram")
    assert len(differing(content, c4())) <= 5
    bpe = train(sample_lines(c4()[:400], 20000, 0), vocab_size=8000, model_type="bpe")
    assert differing(bpe, c4()) == []


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_decode_to_the_text(kind: str):
    content = train(sample_lines(synthetic_documents(60, seed=0), 5000, 0), vocab_size=300, model_type=kind)
    _, library = both(content)
    for text in [*synthetic_documents(5, seed=5), *(text for text in ODD if "\u2581" not in text)]:
        assert library.decode(library.encode(text).ids) == text


def test_user_defined_pieces_are_whole(tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(synthetic_documents(60, seed=0)),
        model_prefix=str(tmp_path / "own"),
        vocab_size=50,
        user_defined_symbols=["<extra>", "lim"],
        minloglevel=2,
    )
    content = (tmp_path / "own.model").read_bytes()
    assert differing(content, ["ba<extra>de lim golim fi", *synthetic_documents(10, seed=3)]) == []


def test_documents_begin_with_the_bos_piece_where_they_did_in_training(tiny_corpus: TinyCorpus):
    content = Path(tiny_corpus.tokenizer).read_bytes()
    library = tokenizers.Tokenizer.from_str(from_sentencepiece(content, begin="<s>"))
    assert library.encode("ban der").tokens[0] == "<s>"
    assert library.encode("ban der", add_special_tokens=False).tokens[0] != "<s>"


def test_a_model_of_words_is_refused(tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(synthetic_documents(60, seed=0)),
        model_prefix=str(tmp_path / "own"),
        vocab_size=30,
        model_type="word",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ConfigError, match="neither unigram nor BPE"):
        from_sentencepiece((tmp_path / "own.model").read_bytes())
