"""The training text of a configuration, whether it is text or prepared shards."""

import json
from collections.abc import Iterator

import numpy as np

from stablelm.config.schema import DataConfig
from stablelm.data import corpus, inspection, shard_corpus, shards
from stablelm.data.encoding import Encoder, document_tokens
from stablelm.data.options import ReadOptions
from stablelm.data.source import documents
from stablelm.data.stores import base_name
from stablelm.data.tokenizer import Tokenizer

KEY = "data.path"
Lists = dict[str, list[str]]
"""Asked path, as JSON, -> files."""


def find(
    data: DataConfig, tokenizer: Tokenizer, *, tokens: int, lanes: int | None = None, known: Lists | None = None
) -> list[str]:
    """Files of data.path, checked to hold so many tokens and to serve so many lanes. Raises ConfigError.

    `known`: lists of paths that were asked for before.
    """
    options = ReadOptions.of(data)
    if data.source == "shards":
        files = (known or {}).get(json.dumps(data.path)) or shard_corpus.resolve(data.path, key=KEY, options=options)
        shard_corpus.check(files, tokenizer.sha256, key=KEY)
        shard_corpus.check_enough(files, tokens, key=KEY)
        if lanes is not None:
            shard_corpus.check_lanes(files, lanes)
        return files
    files = text(data, data.path, key=KEY, known=known)
    inspection.check_enough(files, tokenizer, tokens, key=KEY, column=data.text_column)
    if lanes is not None:
        inspection.check_lanes(files, lanes)
    return files


def text(data: DataConfig, path: str | list[str], *, key: str, known: Lists | None = None) -> list[str]:
    """Files of text at a path, each checked. Raises ConfigError under `key`."""
    options = ReadOptions.of(data)
    files = (known or {}).get(json.dumps(path)) or corpus.resolve(path, key=key, cache=data.cache, options=options)
    inspection.check(files, key=key, column=data.text_column)
    return files


def identity_names(files: list[str], data: DataConfig) -> list[str]:
    """The files as the run's identity has them: the same for text and for shards made of it."""
    if data.source == "shards":
        return shard_corpus.identity_names(files, options=ReadOptions.of(data))
    return [base_name(file) for file in files]


def token_arrays(files: list[str], tokenizer: Encoder, *, options: ReadOptions) -> Iterator[np.ndarray]:
    """Tokens of all documents, eos included, in base-name and file order, one or more documents at a time."""
    if all(map(shards.is_shard, files)):
        yield from shards.documents(files, tokenizer.sha256, options=options)
        return
    for text in documents(files, options):
        yield document_tokens(tokenizer, text)
