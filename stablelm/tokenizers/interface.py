"""What the data layer, and all who work with text, need of a tokenizer of any kind."""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

NO_TOKENS = np.empty(0, np.int32)


class Encoder(Protocol):
    """What the data layer needs of a tokenizer; `sha256` names it in prepared shards.

    `eos`: id of the token that ends a document. `unknown`: id of the token for what no piece can write, None where
    there is none. `encode_arrays` gives the tokens of each document and its eos, int32 (length,), by up to `threads`
    threads: with the bos token before them where documents begin with one, and eos alone where a text has no tokens.
    `decode` gives the text of ids; control tokens such as eos give nothing.
    """

    @property
    def eos(self) -> int: ...

    @property
    def unknown(self) -> int | None: ...

    @property
    def sha256(self) -> str: ...

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Tokenizer(Encoder, Protocol):
    """A loaded tokenizer. Methods may be called from several threads; it can be sent to another process.

    `path`: where it was found, for messages. `pieces`: the smallest vocabulary that holds every id, added tokens
    included (largest id + 1). `bos`: id of the token that begins a document, None where there is none; `add_bos`:
    whether documents begin with it. `sha256`: of the file; of the file and of what eos and bos are where the file
    alone does not say it.
    """

    @property
    def path(self) -> str: ...

    @property
    def pieces(self) -> int: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def add_bos(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos. What looks like a special token in it is text."""
        ...

    def vocabulary(self) -> Mapping[str, int]:
        """Piece -> id, added tokens included."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files that make this tokenizer again, as they were read: in a folder of their own
        they are what `load_tokenizer` opens."""
        ...


def document_tokens(tokenizer: Encoder, text: str | None) -> np.ndarray:
    """Tokens of a document and its eos, int32 (length,); empty where there would be only eos."""
    return with_text(tokenizer.encode_arrays([text])[0]) if text else NO_TOKENS


def with_text(tokens: np.ndarray) -> np.ndarray:
    """The tokens of a row with eos; empty where eos is the only one, since rows without text do not count."""
    return tokens if len(tokens) > 1 else NO_TOKENS


def count_unknown(tokenizer: Encoder, tokens: np.ndarray) -> int:
    """How many of the tokens stand for text that no piece can write."""
    return 0 if tokenizer.unknown is None else int(np.count_nonzero(tokens == tokenizer.unknown))


def restores(tokenizer: Encoder, tokens: np.ndarray, text: str) -> bool:
    """Whether a document's tokens (with eos) hold its text, so that bits per byte of it can be computed.

    White space may be joined, and characters may be in Unicode's compatibility form, as SentencePiece's usual
    normalisation has them; case, accents and word borders must come back.
    """
    if count_unknown(tokenizer, tokens):
        return False
    decoded = tokenizer.decode(tokens[:-1].tolist())
    return decoded == text or _normal(decoded) == _normal(text)


def _normal(text: str) -> str:
    kept = (letter for letter in unicodedata.normalize("NFKC", text) if letter.isspace() or not _is_control(letter))
    return " ".join("".join(kept).split())


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf")
