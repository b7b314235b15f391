from pathlib import Path

import pytest
from support.samples import shared_data

from stablelm.errors import ConfigError
from stablelm.tokenizers import load_tokenizer
from stablelm.tokenizers.training import sample_lines, train

TEXT = ["the quick brown fox jumps over the lazy dog", "a fox is quick and a dog is lazy", "dogs and foxes jump"] * 20
AWKWARD = "  two  spaces\n\n\ttab, naïve café ☃ \x00 日本語 🙂 trailing \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(train(TEXT, vocab_size=285))
    return path


def test_a_trained_model_gives_every_text_back(model: Path):
    tokenizer = load_tokenizer(model)
    assert tokenizer.pieces == 285
    assert tokenizer.eos == 1
    ids = tokenizer.encode(AWKWARD)
    assert tokenizer.decode(ids) == AWKWARD
    assert tokenizer.eos not in ids
    assert tokenizer.decode([*ids, tokenizer.eos]) == AWKWARD


def test_text_that_looks_like_a_control_piece_is_text(model: Path):
    tokenizer = load_tokenizer(model)
    assert tokenizer.eos not in tokenizer.encode("</s>")


def test_sha256_is_of_the_file(model: Path, tmp_path: Path):
    import hashlib

    copy = tmp_path / "copy.model"
    copy.write_bytes(model.read_bytes())
    assert load_tokenizer(copy).sha256 == load_tokenizer(model).sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


def test_equal_lines_give_equal_models_and_other_lines_others():
    assert train(TEXT, vocab_size=285) == train(TEXT, vocab_size=285)
    assert train(TEXT, vocab_size=285) != train([*TEXT, "another thing entirely"], vocab_size=285)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_both_kinds_of_model(model_type: str, tmp_path: Path):
    path = tmp_path / "any.model"
    path.write_bytes(train(TEXT, vocab_size=285, model_type=model_type))
    assert load_tokenizer(path).decode(load_tokenizer(path).encode(AWKWARD)) == AWKWARD


@pytest.mark.parametrize(("pieces", "says"), [(100, "it needs at least 28"), (5000, "it gives at most ")])
def test_a_vocabulary_that_the_text_cannot_give(pieces: int, says: str):
    with pytest.raises(ConfigError, match=rf"^--vocab-size: {pieces} pieces cannot be learned from this text, {says}"):
        train(TEXT, vocab_size=pieces, key="--vocab-size")


def test_no_text_at_all():
    with pytest.raises(ConfigError, match="too little of it; give more text"):
        train([], vocab_size=285)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist; give the path of"),
        (b"", "is not a SentencePiece model"),
        (b"hello, this is text\n", "is not a SentencePiece model"),
        (bytes(range(256)), "is not a SentencePiece model"),
    ],
)
def test_files_that_are_no_model(content: bytes | None, says: str, tmp_path: Path):
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert message.startswith("data.tokenizer: ")
    assert str(path) in message
    assert says in message
    assert "give " in message
    assert caught.value.exit_code == 78


def test_a_truncated_model(model: Path, tmp_path: Path):
    path = tmp_path / "cut.model"
    path.write_bytes(model.read_bytes()[:-700])
    with pytest.raises(ConfigError, match="is not a SentencePiece model"):
        load_tokenizer(path)


def test_a_folder_is_no_model(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no tokenizer; give a SentencePiece"):
        load_tokenizer(tmp_path)


def test_a_model_without_eos(tmp_path: Path):
    import io

    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=writer, vocab_size=34, eos_id=-1, minloglevel=2
    )
    path = tmp_path / "no-eos.model"
    path.write_bytes(writer.getvalue())
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .* has no end-of-document piece; give a model"):
        load_tokenizer(path)


def test_the_draw_of_lines_is_uniform_and_repeatable():
    texts = [f"{n}\n\n  \n" for n in range(1000)]
    drawn = sample_lines(texts, 100, seed=3)
    assert len(set(drawn)) == 100
    assert drawn == sample_lines(texts, 100, seed=3)
    assert drawn != sample_lines(texts, 100, seed=4)
    # The mean of 100 of 0..999 lies within four standard deviations of 499.5.
    assert abs(sum(map(int, drawn)) / 100 - 499.5) < 120
    assert sample_lines(texts, 5000, seed=3) == [str(n) for n in range(1000)]


def test_lines_may_keep_their_ends():
    assert sample_lines(["\n\na\n\n\tb\n", " \nc"], 9, seed=0, ends=True) == ["a\n\n", "\tb\n", "c"]


def test_t5_and_mistral():
    t5 = load_tokenizer(shared_data("tokenizers/t5-32k-unigram.model"))
    mistral = load_tokenizer(shared_data("tokenizers/mistral-v1-32k-bpe.model"))
    assert (t5.pieces, t5.eos) == (32000, 1)
    assert (mistral.pieces, mistral.eos) == (32000, 2)
    assert 1 not in mistral.encode("no bos, no eos")  # bos is 1
    assert mistral.decode(mistral.encode("a snowman ☃")) == "a snowman ☃"
