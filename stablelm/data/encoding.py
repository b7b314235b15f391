"""From a document to its tokens: what the data layer asks of a tokenizer, and where eos goes."""

from typing import Protocol

import numpy as np

IGNORED = -100  # as a target: no target


class Encoder(Protocol):
    """What the data layer needs of a tokenizer; `sha256` names it in prepared shards."""

    @property
    def eos(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def encode_array(self, text: str) -> np.ndarray: ...


def document_tokens(tokenizer: Encoder, text: str) -> np.ndarray:
    """Tokens of a document and its eos, int32 (length,)."""
    ids = tokenizer.encode_array(text)
    tokens = np.empty(len(ids) + 1, np.int32)
    tokens[:-1] = ids
    tokens[-1] = tokenizer.eos
    return tokens
