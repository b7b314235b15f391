"""From a document to its tokens: what the data layer asks of a tokenizer, and where eos goes."""

from typing import Protocol

import numpy as np

IGNORED = -100  # as a target: no target
NO_TOKENS = np.empty(0, np.int32)


class Encoder(Protocol):
    """What the data layer needs of a tokenizer; `sha256` names it in prepared shards.

    `unknown`: id of the token for what no piece can write.
    `encode_arrays` gives the tokens of each document and its eos, int32 (length,), by up to `threads` threads.
    """

    @property
    def eos(self) -> int: ...

    @property
    def unknown(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]: ...


def document_tokens(tokenizer: Encoder, text: str | None) -> np.ndarray:
    """Tokens of a document and its eos, int32 (length,); none where eos would be all or there is no text."""
    return with_text(tokenizer.encode_arrays([text])[0]) if text else NO_TOKENS


def with_text(tokens: np.ndarray) -> np.ndarray:
    """Tokens of a row with eos, or none of a row that has eos alone: without text it does not exist."""
    return tokens if len(tokens) > 1 else NO_TOKENS
