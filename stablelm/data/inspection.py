"""The text of a run: its files, found and checked before anything is created (format, completeness, size).

Local files are all opened; of those in other stores the first and the last are.
"""

import json
import os
from dataclasses import replace
from itertools import islice

from stablelm.config import mixture
from stablelm.config.schema import DataConfig
from stablelm.data import corpus
from stablelm.data.formats import dataset_files, tables
from stablelm.data.formats.file_rows import SUFFIXES, SUFFIXES_IN_WORDS, document_text, documents, rows_from
from stablelm.data.formats.text_lines import BadRow
from stablelm.data.shards import shard_files
from stablelm.data.storage.options import ReadOptions, base_name, local_path
from stablelm.data.storage.range_file import LookEnded, RangeFile
from stablelm.errors import ConfigError, DataError, Problems
from stablelm.small_files import open_regular
from stablelm.tokenizers import Encoder
from stablelm.tokenizers.interface import document_tokens

# A zstandard file may begin with a frame to skip, of one of 16 kinds.
SKIPPABLE = {bytes([kind]) + b"\x2a\x4d\x18": "zstandard" for kind in range(0x50, 0x60)}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", **SKIPPABLE, b"PAR1": "parquet"}
SMALL_FILE = 8 * 2**20  # compressed bytes up to which a file is read to its end
TRIED = 1000  # rows of a large file among which one must hold a document, where bad ones are skipped
SMALL_CORPUS = 64 * 2**20  # compressed bytes that one check reads at most, beside the first records


def text_files(path: str | list[str], *, key: str, cache: str, options: ReadOptions) -> list[str]:
    """The files of text at a path, each checked. Raises ConfigError under `key`."""
    files = corpus.resolve(path, key=key, cache=cache, options=options)
    check(files, key=key, options=options)
    return files


def check(files: list[str], *, key: str, options: ReadOptions | None = None) -> None:
    """Each local file can be read, is what its name says and begins with a row that gives a text by `options`.

    Small files are also read to the end, so that a truncated copy or a bad row is found now rather than in the
    middle of training. Raises ConfigError under `key`, a line for each file that is wrong.
    """
    budget, options, problems = SMALL_CORPUS, _once(options), Problems()
    for path in _local(files):
        with problems.collecting(key):
            size = _check_form(path, key)
            whole = size <= min(SMALL_FILE, budget)
            budget -= size if whole else 0
            _read(path, key, options, whole)
    problems.raise_any()


def check_remote(files: list[str], *, key: str, options: ReadOptions) -> None:
    """The first and the last of the remote files can be read by ranges and hold text, as `check` finds it.

    A store must answer within seconds; one that reports that it is busy is waited for as in training.
    Raises ConfigError under `key`.
    """
    # The shards of a dataset were opened when they were found.
    urls = [file for file in files if local_path(file) is None and not tables.is_dataset_file(file)]
    options, problems = options.first_look(), Problems()
    for url in dict.fromkeys([*urls[:1], *urls[-1:]]):
        with problems.collecting(key):
            with RangeFile(url, options.for_a_while()) as file:
                size, head = file.stamp().size, file.read(4)
            _check_content(url, size, head or b"", key)
            _read(url, key, options, whole=size <= SMALL_FILE)
    problems.raise_any()


def check_enough(
    files: list[str], tokenizer: Encoder, tokens_needed: int, *, key: str, options: ReadOptions | None = None
) -> None:
    """A local corpus holds at least `tokens_needed` tokens, eos after each document included.

    Nothing is read where the size of the files is enough to know, and reading stops at so many tokens.
    Raises ConfigError under `key`, with the number of tokens there are.
    """
    paths = _near(files)
    if len(paths) < len(files) or sum(os.path.getsize(tables.stored_at(path)) for path in paths) >= 4 * tokens_needed:
        return
    tokens = count = 0
    try:
        for text in documents(paths, _once(options)):
            length = len(document_tokens(tokenizer, text))
            tokens += length
            count += length > 0
            if tokens >= tokens_needed:
                return
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    first = tables.stored_at(paths[0])
    where = f"{first!r} holds" if len(paths) == 1 else f"the {len(paths)} files from {first!r} on hold"
    raise ConfigError(
        f"{key}: {where} {tokens} tokens in {count} documents, fewer than the {tokens_needed} of one batch; "
        "give more text, or lower train.global_batch_size or data.seq_len"
    )


def check_lanes(files: list[str], lanes: int, *, options: ReadOptions | None = None) -> None:
    """Each lane gets at least one document: with F < lanes files each file is dealt to ceil(lanes / F) of them.

    Raises ConfigError under `data.lanes` with the most lanes that these files allow. Remote files are not checked.
    """
    shares = -(-lanes // len(files))
    if shares == 1:
        return
    fewest, shortest = shares, ""
    for path in _near(files):
        try:
            count = sum(1 for _ in islice(documents([path], _once(options)), fewest))
        except DataError as error:
            raise ConfigError(f"data.lanes: {error}") from None
        if count < fewest:
            fewest, shortest = count, tables.stored_at(path)
    if shortest and fewest:
        raise ConfigError(
            f"data.lanes: {lanes} lanes over {len(files)} files take {shares} documents from each, but {shortest!r} "
            f"holds {fewest}; set at most {fewest * len(files)} lanes, or give more text"
        )
    if shortest:
        raise ConfigError(
            f"data.lanes: {shortest!r} holds no document for {lanes} lanes; leave it out or give more text"
        )


def _local(files: list[str]) -> list[str]:
    return [path for file in files if (path := local_path(file)) is not None]


def _near(files: list[str]) -> list[str]:
    """Local files, and shards of a data set in one."""
    return [local_path(file) or file for file in files if local_path(tables.stored_at(file)) is not None]


def _check_form(path: str, key: str) -> int:
    """Bytes of a file whose name and first bytes agree."""
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{key}: {path!r} is of an unsupported file type; give files named {SUFFIXES_IN_WORDS}")
    try:
        with open(open_regular(path), "rb") as file:
            head, size = file.read(4), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path!r} ({error.strerror or error}); check the path and its permissions"
        ) from None
    _check_content(path, size, head, key)
    return size


def _check_content(path: str, size: int, head: bytes, key: str) -> None:
    if size == 0:
        raise ConfigError(f"{key}: {path!r} is empty; leave it out or fetch it again")
    content = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "plain")
    expected = {".gz": "gzip", ".zst": "zstandard", ".parquet": "parquet"}.get(
        os.path.splitext(base_name(path))[1], "plain"
    )
    if content != expected:
        raise ConfigError(
            f"{key}: {path!r} holds {content} data, but its name says {expected}; rename it or fetch it again"
        )


def _once(options: ReadOptions | None) -> ReadOptions:
    """These options for local files, without retries and cache."""
    return replace(
        options or ReadOptions(),
        retry_budget=0,
        cache=None,
        cache_bytes=0,
        storage={},
        stamps={},
        seen=None,
        first_answer=None,
        until=None,
    )


def _read(path: str, key: str, options: ReadOptions, whole: bool) -> None:
    """The first row gives a text, or is excluded; with `whole` all do, as far as the time limit allows.

    With `bad_rows=skip` one row must.
    """
    count, found, first_bad = 0, False, None
    try:
        for count, row in enumerate(rows_from(path, 0, options.for_a_while())[1], 1):
            try:
                document_text(row, url=path, column=options.text_column)
                found = True
            except BadRow as error:
                if options.bad_rows != "skip":
                    raise
                first_bad = first_bad or error
            if not whole and (found or count == TRIED):
                break
    except LookEnded:
        if not found:
            raise
    if not count:
        raise ConfigError(f"{key}: {path!r} holds no document; leave it out or fetch it again")
    if not found:
        raise ConfigError(f"{key}: {first_bad} (data.bad_rows=skip would leave nothing of this file)")


Lists = dict[str, list[str]]
"""Asked path, as JSON, -> files."""
Sources = dict[str, list[str]]
"""Files of each source of a run; the only one, of data.path, is called ''."""


def paths(data: DataConfig) -> dict[str, str | list[str]]:
    """The path of each source, as `corpus.resolve` or `shard_files.resolve` takes it."""
    if not data.mixture:
        return {"": asked(data, data.path, split="train")}
    return {name: asked(data, source.path, split="train") for name, source in mixture.sources(data).items()}


def asked(data: DataConfig, path: str | list[str], *, split: str) -> str | list[str]:
    """A path as it is looked up: with source=datasets a data set, of this split unless the path names another."""
    if data.source != "datasets":
        return path
    # A split that is given for the training text is none for a validation set.
    given = {name: value for name, value in data.dataset.items() if name != "split" or split == "train"}
    if isinstance(path, str):
        return dataset_files.address(path, given, split=split)
    return [dataset_files.address(each, given, split=split) for each in path]


def find(
    data: DataConfig, tokenizer: Encoder, *, tokens: int, lanes: int | None = None, known: Lists | None = None
) -> Sources:
    """The training files, of each source checked to hold so many tokens and to serve so many lanes.

    `known`: lists of paths that were looked up before. Raises ConfigError.
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
    tokenizer: Encoder,
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
    check_enough(files, tokenizer, tokens, key=key, options=ReadOptions.of(data))
    if lanes is not None:
        check_lanes(files, lanes, options=ReadOptions.of(data))
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
    check(files, key=key, options=options)
    return files


def identity_names(sources: Sources, data: DataConfig) -> list[str] | dict[str, list[str]]:
    """The files as the run's identity has them, by source if there are several: the same for text and its shards."""
    names = {name: _identity_names(files, data) for name, files in sources.items()}
    return names if data.mixture else names[""]


def _identity_names(files: list[str], data: DataConfig) -> list[str]:
    if data.source == "shards":
        return shard_files.identity_names(files, options=ReadOptions.of(data))
    return [base_name(file) for file in files]
