"""The tokenizer's files of an export, and whether they give the ids that the run was trained on."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from stablelm.data.tokenizers import Tokenizer
from stablelm.export.tokenizer_json import from_sentencepiece

JSON, SETTINGS, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
CLASS = "PreTrainedTokenizerFast"
"""Reads a tokenizer.json as it is, in transformers 4 and 5."""


class TokenIds(NamedTuple):
    """Ids that a configuration names; `pad` is what generation fills rows with."""

    bos: int | None
    eos: int
    pad: int


class Difference(NamedTuple):
    """In how many of so many documents the exported tokenizer gives other ids."""

    differing: int
    documents: int


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """The ids of a run's tokenizer; it pads with a SentencePiece model's own padding piece, else with eos."""
    content = tokenizer.files().get(SENTENCEPIECE)
    own = -1 if content is None else _sentencepiece(content).pad_id()
    return TokenIds(tokenizer.bos, tokenizer.eos, own if own >= 0 else tokenizer.eos)


def contents(tokenizer: Tokenizer, *, longest: int) -> dict[str, bytes]:
    """The tokenizer's own files byte for byte, by name, and what transformers lacks beside them.

    `longest`: tokens that the model takes. Of a SentencePiece model that is a tokenizer.json. Raises ConfigError for
    one that cannot be converted.
    """
    from tokenizers import Tokenizer as Library

    files = dict(tokenizer.files())
    if JSON not in files:
        begin = _sentencepiece(files[SENTENCEPIECE]).id_to_piece(tokenizer.bos) if tokenizer.add_bos else None
        files[JSON] = from_sentencepiece(files[SENTENCEPIECE], begin=begin).encode()
    library = Library.from_str(files[JSON].decode())
    if SETTINGS not in files:
        ids, unknown = token_ids(tokenizer), tokenizer.unknown
        named = {"bos_token": ids.bos, "eos_token": ids.eos, "unk_token": unknown, "pad_token": ids.pad}
        settings: dict[str, Any] = {
            "tokenizer_class": CLASS,
            **{role: library.id_to_token(number) for role, number in named.items() if number is not None},
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            # What looks like a special token in a text is text, as in training.
            "split_special_tokens": True,
        }
        files[SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def difference(files: dict[str, bytes], tokenizer: Tokenizer, texts: Iterable[str]) -> Difference:
    """Compares the ids of the exported tokenizer.json with the run's, document by document."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(files[JSON].decode())
    library.encode_special_tokens = True
    differing = documents = 0
    for text in texts:
        documents += 1
        differing += library.encode(text, add_special_tokens=False).ids != list(tokenizer.encode(text))
    return Difference(differing, documents)


def _sentencepiece(content: bytes) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=content)
