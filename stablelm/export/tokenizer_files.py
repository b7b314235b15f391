"""The tokenizer's files of an export, and whether they give the ids that the run was trained on."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from stablelm.export.tokenizer_json import from_sentencepiece
from stablelm.tokenizers import Tokenizer

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
    """The tokenizer's own files, by name, and what transformers lacks beside them.

    They are the same bytes where they put bos before a text, and nothing else, as training did; else they are made to.
    `longest`: tokens that the model takes. Of a SentencePiece model a tokenizer.json is added. Raises ConfigError for
    one that cannot be converted.
    """
    from tokenizers import Tokenizer as Library

    files = dict(tokenizer.files())
    if JSON not in files:
        begin = _sentencepiece(files[SENTENCEPIECE]).id_to_piece(tokenizer.bos) if tokenizer.add_bos else None
        files[JSON] = from_sentencepiece(files[SENTENCEPIECE], begin=begin).encode()
    files[JSON] = _framing(files[JSON], tokenizer)
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
    else:
        files[SETTINGS] = _agreeing(files[SETTINGS], tokenizer)
    return files


def around(content: bytes, text: str = "a") -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json puts before and after a text."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(content.decode())
    library.no_padding()
    library.no_truncation()
    whole, plain = library.encode(text).ids, library.encode(text, add_special_tokens=False).ids
    before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return whole[:before], whole[before + len(plain) :]


def _framing(content: bytes, tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that puts around a text what the prompts of training had."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    if around(content) == (begin, []):
        return content
    library = Library.from_str(content.decode())
    names = [(library.id_to_token(number), number) for number in begin]
    first = [f"{name}:0" for name, _ in names]
    second = [f"{name}:1" for name, _ in names]
    library.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0"], pair=[*first, "$A:0", *second, "$B:1"], special_tokens=names
    )
    return library.to_str(pretty=True).encode()


def _agreeing(content: bytes, tokenizer: Tokenizer) -> bytes:
    """A tokenizer_config.json that asks for no other tokens around a text than training had."""
    settings = json.loads(content)
    changed = {
        name: value
        for name, value in (("add_bos_token", tokenizer.add_bos), ("add_eos_token", False))
        if settings.get(name) not in (None, value)
    }
    if not changed:
        return content
    return (json.dumps(settings | changed, indent=2, ensure_ascii=False) + "\n").encode()


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
