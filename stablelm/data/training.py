"""The training text of a configuration, whether it is text or prepared shards."""

import json
from collections.abc import Iterator

import numpy as np

from stablelm.config import mixture
from stablelm.config.schema import DataConfig
from stablelm.data import corpus, inspection
from stablelm.data.encoding import Encoder, document_tokens
from stablelm.data.formats import dataset_files
from stablelm.data.formats.file_rows import documents
from stablelm.data.problems import Problems
from stablelm.data.shards import shard_files, shard_format, shard_reader
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.stores import base_name
from stablelm.data.tokenizer import Tokenizer

Lists = dict[str, list[str]]
"""Asked path, as JSON, -> files."""
Sources = dict[str, list[str]]
"""Files of each source of a run; the only one, of data.path, is called ''."""


def paths(data: DataConfig) -> dict[str, str | list[str]]:
    """Where each source lies, as `corpus.resolve` or `shard_files.resolve` takes it."""
    if not data.mixture:
        return {"": asked(data, data.path, split="train")}
    return {name: asked(data, source.path, split="train") for name, source in mixture.sources(data).items()}


def asked(data: DataConfig, path: str | list[str], *, split: str) -> str | list[str]:
    """A path as it is looked up: with source=datasets a data set, of this split unless it says another."""
    if data.source != "datasets":
        return path
    # A split that is given for the training text is none for a validation set.
    given = {name: value for name, value in data.dataset.items() if name != "split" or split == "train"}
    if isinstance(path, str):
        return dataset_files.address(path, given, split=split)
    return [dataset_files.address(each, given, split=split) for each in path]


def find(
    data: DataConfig, tokenizer: Tokenizer, *, tokens: int, lanes: int | None = None, known: Lists | None = None
) -> Sources:
    """The training files, of each source checked to hold so many tokens and to serve so many lanes.

    `known`: lists of paths that were asked for before. Raises ConfigError.
    """
    found, problems = {}, Problems()
    for name, path in paths(data).items():
        key = f"data.mixture.{name}.path" if name else "data.path"
        with problems.collecting():
            found[name] = _find(data, path, tokenizer, key=key, tokens=tokens, lanes=lanes, known=known or {})
    problems.raise_any()
    return found


def _find(
    data: DataConfig,
    path: str | list[str],
    tokenizer: Tokenizer,
    *,
    key: str,
    tokens: int,
    lanes: int | None,
    known: Lists,
) -> list[str]:
    if data.source == "shards":
        looking = ReadOptions.of(data).first_look()
        files = known.get(json.dumps(path)) or shard_files.resolve(path, key=key, options=looking)
        shard_files.check(files, tokenizer.sha256, key=key)
        shard_files.check_enough(files, tokens, key=key)
        if lanes is not None:
            shard_files.check_lanes(files, lanes)
        return files
    files = text(data, path, key=key, known=known)
    inspection.check_enough(files, tokenizer, tokens, key=key, options=ReadOptions.of(data))
    if lanes is not None:
        inspection.check_lanes(files, lanes, options=ReadOptions.of(data))
    return files


def text(
    data: DataConfig,
    path: str | list[str],
    *,
    key: str,
    known: Lists | None = None,
    options: ReadOptions | None = None,
) -> list[str]:
    """Files of text at a path, each checked. Raises ConfigError under `key`. `options`: the configuration's if None."""
    options = options or ReadOptions.of(data)
    looking = options.first_look()
    files = (known or {}).get(json.dumps(path)) or corpus.resolve(path, key=key, cache=data.cache, options=looking)
    inspection.check(files, key=key, options=options)
    return files


def identity_names(sources: Sources, data: DataConfig) -> list[str] | dict[str, list[str]]:
    """The files as the run's identity has them, by source if there are several: the same for text and its shards."""
    names = {name: _identity_names(files, data) for name, files in sources.items()}
    return names if data.mixture else names[""]


def _identity_names(files: list[str], data: DataConfig) -> list[str]:
    if data.source == "shards":
        return shard_files.identity_names(files, options=ReadOptions.of(data))
    return [base_name(file) for file in files]


def token_arrays(files: list[str], tokenizer: Encoder, *, options: ReadOptions) -> Iterator[np.ndarray]:
    """Tokens of all documents, eos included, in base-name and file order, one or more documents at a time."""
    if all(map(shard_format.is_shard, files)):
        yield from shard_reader.documents(files, tokenizer.sha256, options=options)
        return
    for text in documents(files, options):
        yield document_tokens(tokenizer, text)
