"""The training text of a configuration, whether it is text or prepared shards."""

from collections.abc import Iterator

import numpy as np

from stablelm.config.schema import DataConfig
from stablelm.data import corpus, inspection, shard_corpus, shards
from stablelm.data.encoding import Encoder, document_tokens
from stablelm.data.reader import base_name
from stablelm.data.source import documents
from stablelm.data.tokenizer import Tokenizer

KEY = "data.path"


def find(data: DataConfig, tokenizer: Tokenizer, *, tokens: int, lanes: int | None = None) -> list[str]:
    """Files of data.path, checked to hold so many tokens and to serve so many lanes. Raises ConfigError."""
    if data.source == "shards":
        files = shard_corpus.resolve(data.path, key=KEY, retry_budget=data.retry_budget)
        shard_corpus.check(files, tokenizer.sha256, key=KEY)
        shard_corpus.check_enough(files, tokens, key=KEY)
        if lanes is not None:
            shard_corpus.check_lanes(files, lanes)
        return files
    files = corpus.resolve(data.path, key=KEY, cache=data.cache)
    inspection.check(files, key=KEY)
    inspection.check_enough(files, tokenizer, tokens, key=KEY)
    if lanes is not None:
        inspection.check_lanes(files, lanes)
    return files


def identity_names(files: list[str], data: DataConfig) -> list[str]:
    """The files as the run's identity has them: the same for text and for shards made of it."""
    if data.source == "shards":
        return shard_corpus.identity_names(files, retry_budget=data.retry_budget)
    return [base_name(file) for file in files]


def token_arrays(files: list[str], tokenizer: Encoder, *, retry_budget: float) -> Iterator[np.ndarray]:
    """Tokens of all documents, eos included, in base-name and file order, one or more documents at a time."""
    if all(map(shards.is_shard, files)):
        yield from shards.documents(files, tokenizer.sha256, retry_budget=retry_budget)
        return
    for text in documents(files, retry_budget=retry_budget):
        yield document_tokens(tokenizer, text)
