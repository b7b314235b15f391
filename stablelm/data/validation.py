"""The fixed windows on which a run is measured, and the unigram baseline that it must beat."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stablelm.data.formats.file_rows import documents
from stablelm.data.shards import shard_format, shard_reader
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError, listed
from stablelm.model.targets import IGNORED
from stablelm.tokenizers.interface import Encoder, document_tokens, restores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ValidationSet:
    """Windows of a corpus: int64 (n, seq_len); a target of -100 is no target.

    `bytes_per_token`: UTF-8 bytes a token (eos counted) of the documents that were touched, which turns
    nats a token into bits a byte: loss / (ln 2 * bytes_per_token); None where the tokens do not give a text back (an
    unknown token, case that is lost), since not all of it is predicted then. `documents`: how many were
    touched.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    bytes_per_token: float | None
    documents: int


def touched(
    files: list[str], tokenizer: Encoder, *, tokens: int, options: ReadOptions
) -> Iterator[tuple[np.ndarray, str]]:
    """(tokens with eos, text) of the documents that hold the first so many tokens.

    Raises DataError when a file cannot be read or there is not one document.
    """
    length = 0
    for text in documents(files, options):
        if length >= tokens:
            return
        found = document_tokens(tokenizer, text)
        if len(found):
            length += len(found)
            yield found, text
    if not length:
        raise DataError(f"{listed(files)}: no text to predict; give files with documents")


def read(files: list[str], tokenizer: Encoder, *, seq_len: int, sequences: int, options: ReadOptions) -> ValidationSet:
    """One pass over the files in base-name order, documents in file order, each followed by eos.

    At most `sequences` windows of seq_len+1 tokens which overlap by one token; the last one is padded
    where the corpus ends. Raises DataError when a file cannot be read or there is not one document.
    """
    import torch

    needed = sequences * seq_len + 1
    parts: list[np.ndarray] = []
    text_bytes, restored = 0, True
    for tokens_of_one, text in touched(files, tokenizer, tokens=needed, options=options):
        parts.append(tokens_of_one)
        text_bytes += len(text.encode())
        restored = restored and restores(tokenizer, tokens_of_one, text)
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
        text_bytes / sum(map(len, parts)) if restored else None,
        len(parts),
    )


def unigram_cross_entropy(
    train: Mapping[str, list[str]],
    tokenizer: Encoder,
    validation: ValidationSet,
    *,
    vocab: int,
    tokens: int,
    options: ReadOptions,
    shares: Mapping[str, float] | None = None,
) -> float:
    """Mean cross-entropy, in nats per token, of an add-one unigram model on the validation targets.

    The model is p(v) = (count(v) + 1) / (N + vocab) over the first N = `tokens` training tokens (files in
    base-name order, documents in file order, eos counted; fewer if there are fewer), of several sources each its share
    of `shares`. Raises DataError.
    """
    counts = np.ones(vocab, np.int64)
    for name, files in train.items():
        remaining = tokens if shares is None else round(tokens * shares[name])
        for tokens_of_some in token_arrays(files, tokenizer, options=options):
            if remaining <= 0:
                break
            ids = tokens_of_some[:remaining]
            counts += np.bincount(ids, minlength=vocab)
            remaining -= len(ids)
    targets = validation.targets.numpy()
    log_probability = np.log(counts) - np.log(counts.sum())
    return float(-log_probability[targets[targets >= 0]].mean())


def token_arrays(files: list[str], tokenizer: Encoder, *, options: ReadOptions) -> Iterator[np.ndarray]:
    """Tokens of all documents, eos included, in base-name and file order, one or more documents at a time."""
    if all(map(shard_format.is_shard, files)):
        yield from shard_reader.documents(files, tokenizer.sha256, options=options)
        return
    for text in documents(files, options):
        yield document_tokens(tokenizer, text)
