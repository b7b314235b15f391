"""A fixed set of windows on which a run is measured, the same ones every time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stablelm.data.encoding import IGNORED, Encoder, document_tokens
from stablelm.data.options import ReadOptions
from stablelm.data.source import documents
from stablelm.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ValidationSet:
    """Windows of a corpus: int64 (n, seq_len); a target of -100 is no target.

    `bytes_per_token`: UTF-8 bytes a token (eos counted) of the documents that were touched, which turns
    nats a token into bits a byte: loss / (ln 2 * bytes_per_token). `documents`: how many were touched.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    bytes_per_token: float
    documents: int


def read(files: list[str], tokenizer: Encoder, *, seq_len: int, sequences: int, options: ReadOptions) -> ValidationSet:
    """One pass over the files in base-name order, documents in file order, each followed by eos.

    At most `sequences` windows of seq_len+1 tokens which overlap by one token; the last one is padded
    where the corpus ends. Raises DataError when a file cannot be read or there is not one document.
    """
    import torch

    needed = sequences * seq_len + 1
    parts: list[np.ndarray] = []
    length = text_bytes = 0
    for text in documents(files, options):
        if length >= needed:
            break
        parts.append(document_tokens(tokenizer, text))
        length += len(parts[-1])
        text_bytes += len(text.encode())
    if length < 2:
        raise DataError(f"data.validation: {', '.join(files)} hold no text to predict; give files with documents")
    stream = np.concatenate(parts).astype(np.int64)[:needed]
    count = -(-(len(stream) - 1) // seq_len)
    tokens = np.full(count * seq_len, tokenizer.eos, np.int64)
    targets = np.full(count * seq_len, IGNORED, np.int64)
    tokens[: len(stream) - 1] = stream[:-1]
    targets[: len(stream) - 1] = stream[1:]
    shape = (count, seq_len)
    return ValidationSet(
        torch.from_numpy(tokens.reshape(shape)),
        torch.from_numpy(targets.reshape(shape)),
        text_bytes / length,
        len(parts),
    )
