"""A tokenizer in the terms of llama.cpp: which of its algorithms gives the same ids, its pieces, and their kinds.

llama.cpp has SentencePiece's two algorithms, named `llama` (BPE: the neighbours of the best score are merged) and `t5`
(unigram: the best sum of scores), and byte-level BPE, `gpt2`, whose splitting of text it knows by name alone. Three
differences remain. Its unigram knows no byte pieces and writes <unk> for characters outside the vocabulary, so byte
pieces of ASCII characters, the line feed among them, are given as pieces of their own with the score that SentencePiece
has for them; other unknown characters stay <unk>. Its BPE of scores applies no normalisation of Unicode, and its
byte-level BPE none either.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from stablelm.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, as llama.cpp and SentencePiece number them."""
UNIGRAM, BPE = 1, 2
"""Kinds of SentencePiece models."""
UNKNOWN_PENALTY = 10.0
"""SentencePiece's unigram gives a character without a piece the lowest score less this."""
PAD_SCORE = -10000.0
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
PRE_TOKENIZERS = {
    (GPT2, False): "gpt-2",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "dbrx",
    (QWEN2, False): "qwen2",
}
"""llama.cpp's name of a pattern, with and without whole words before merges."""


@dataclass(frozen=True)
class Vocabulary:
    """`model`: the algorithm; `tokens`, `types` and `scores` (None: it has none) by id; `flags`: keys of its own."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    charsmap: bytes = b""
    flags: dict[str, bool] = field(default_factory=dict)


def vocabulary(files: dict[str, bytes], size: int) -> Vocabulary:
    """Of a tokenizer's own files by name, filled up to `size` rows of the embedding.

    Raises ConfigError, which names what it is, for one that llama.cpp does not compute.
    """
    content = files.get("tokenizer.json")
    found = _sentencepiece(files["tokenizer.model"]) if content is None else _byte_level(json.loads(content))
    missing = range(len(found.tokens), size)
    found.tokens.extend(f"[PAD{number}]" for number in missing)
    found.types.extend(UNUSED for _ in missing)
    if found.scores is not None:
        found.scores.extend(PAD_SCORE for _ in missing)
    return found


def _sentencepiece(content: bytes) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (UNIGRAM, BPE):
        raise ConfigError(
            "--format gguf: the run's SentencePiece model is of a kind that llama.cpp does not compute; "
            "use another format"
        )
    tokens, types = [piece.piece for piece in proto.pieces], [piece.type for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    if kind == UNIGRAM:
        lowest = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
        known = {token for token, each in zip(tokens, types, strict=True) if each in (NORMAL, USER_DEFINED)}
        for number, each in enumerate(types):
            character = _ascii(tokens[number]) if each == BYTE else None
            if character is not None and character not in known:
                tokens[number], types[number], scores[number] = character, NORMAL, lowest - UNKNOWN_PENALTY
    return Vocabulary(
        model="t5" if kind == UNIGRAM else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        charsmap=spec.precompiled_charsmap if kind == UNIGRAM else b"",
        flags={
            "add_space_prefix": spec.add_dummy_prefix,
            **({"remove_extra_whitespaces": spec.remove_extra_whitespaces} if kind == UNIGRAM else {}),
        },
    )


def _ascii(piece: str) -> str | None:
    """The character of a byte piece such as <0x0A>, of those that are characters by themselves and can stand in text.

    A space is written as another character, and a null would end the piece.
    """
    number = int(piece.removeprefix("<0x").removesuffix(">"), 16)
    return chr(number) if 0 < number < 128 and number != ord(" ") else None


def _byte_level(described: dict[str, Any]) -> Vocabulary:
    model, added = described["model"], described.get("added_tokens") or []
    pattern = _pattern(described.get("pre_tokenizer"))
    pre = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges")))) if pattern is not None else None
    normalizer = described.get("normalizer")
    if model.get("type", "BPE") != "BPE" or pre is None or (normalizer and normalizer.get("type") != "NFC"):
        raise ConfigError(
            "--format gguf: llama.cpp has no name for how the run's tokenizer.json splits text (it has byte-level BPE "
            "as in GPT-2, Llama 3 and Qwen 2); use another format, or train with one of these"
        )
    ids = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(ids, NORMAL)
    for each in added:
        ids[each["id"]] = each["content"]
        types[each["id"]] = CONTROL if each.get("special") else USER_DEFINED
    count = max(ids, default=-1) + 1
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=[ids.get(number, f"[PAD{number}]") for number in range(count)],
        types=[types.get(number, UNUSED) for number in range(count)],
        merges=merges,
    )


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern by which a byte-level BPE splits text; None for any other way."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not steps or any(step is None for step in steps) or steps[-1].get("type") != "ByteLevel":
        return None
    byte_level, splits = steps[-1], steps[:-1]
    if byte_level.get("add_prefix_space"):
        return None
    if not splits:
        return GPT2 if byte_level.get("use_regex", True) else None
    (split,) = splits if len(splits) == 1 else (None,)
    if split is None or split.get("type") != "Split" or byte_level.get("use_regex", True):
        return None
    plain = split.get("behavior") == "Isolated" and not split.get("invert")
    return split["pattern"].get("Regex") if plain else None
