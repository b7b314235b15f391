"""Small tokenizer.json files in the forms that are found in the wild, built with the library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stablelm.tokenizers.training import sample_lines, train_byte_level

TEXT = [
    "the quick brown fox jumps over the lazy dog\n\n\tand the dog sleeps on",
    "a fox is quick and a dog is lazy, isn't it? 12345 foxes",
    "dogs and foxes jump over naïve cafés",
] * 20
AWKWARD = "  two  spaces\n\n\ttab, naïve café e\u0301 ☃ \x00 日本語 🙂 don't 2048 trailing \n"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(pieces: int = 290) -> bytes:
    """As data/train_tokenizer.py --kind bpe-bytes writes it."""
    return train_byte_level(sample_lines(TEXT, 1000, seed=0, ends=True), vocab_size=pieces)


def gpt2() -> bytes:
    """GPT-2's form: the end of a text comes last in the vocabulary; a post-processor that only trims offsets."""
    made = _byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), [])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return made.to_str().encode()


def llama3() -> bytes:
    """Llama 3's form: digits by threes, special tokens behind the vocabulary, a template that begins with bos."""
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated", invert=False)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = _byte_level_bpe(pre_tokenizers.Sequence([split, bytes_]), [])
    made.model.ignore_merges = True
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"]
    made.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    begin = made.token_to_id(names[0])
    made.post_processor = processors.TemplateProcessing(f"{names[0]} $A", special_tokens=[(names[0], begin)])
    return made.to_str().encode()


def unigram() -> bytes:
    """T5's form: eos and unknown within the unigram vocabulary, spaces as '▁'."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return made.to_str().encode()


def word_piece() -> bytes:
    """BERT's form, which loses case and spaces."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    return made.to_str().encode()


def changed(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with one thing changed in it."""
    described = json.loads(content)
    change(described)
    return json.dumps(described).encode()


def write(folder: Path, content: bytes, **settings: Mapping[str, Any]) -> Path:
    """A folder with the tokenizer.json and the files of settings beside it, named without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(content)
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def _byte_level_bpe(pre_tokenizer: Any, special: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return made
