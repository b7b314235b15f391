"""From a document to its tokens: what the data layer asks of a tokenizer, and where eos goes."""

from typing import Protocol

import numpy as np

IGNORED = -100  # as a target: no target


class Encoder(Protocol):
    """What the data layer needs of a tokenizer; `sha256` names it in prepared shards.

    `encode_arrays` gives the tokens of each document and its eos, int32 (length,), by up to `threads` threads.
    """

    @property
    def eos(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]: ...


def document_tokens(tokenizer: Encoder, text: str) -> np.ndarray:
    """Tokens of a document and its eos, int32 (length,)."""
    return tokenizer.encode_arrays([text])[0]
