"""What is looked at in a corpus before anything is created: form, completeness, size.

Local files are all opened; of those in other stores the first and the last are.
"""

import os
import time
from contextlib import suppress

from stablelm.data import dataset_rows
from stablelm.data.options import ReadOptions
from stablelm.data.rangefile import LookEnded, RangeFile
from stablelm.data.source import document_text, documents, row_count, rows_from
from stablelm.data.stores import base_name, local_path
from stablelm.data.tokenizer import Tokenizer
from stablelm.errors import ConfigError, DataError
from stablelm.small_files import open_regular

SUFFIXES = (".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".json", ".jsonl", ".parquet")
SUFFIXES_IN_WORDS = f"{', '.join('*' + suffix for suffix in SUFFIXES[:-1])} or *{SUFFIXES[-1]}"
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"PAR1": "parquet"}
SMALL_FILE = 8 * 2**20  # compressed bytes up to which a file is read to its end
SMALL_CORPUS = 64 * 2**20  # compressed bytes that one check reads at most, beside the first records


def check(files: list[str], *, key: str, options: ReadOptions | None = None) -> None:
    """Each local file can be read, is what its name says and begins with a row that gives a text by `options`.

    Small files are also read to the end, so that a truncated copy is found now rather than in the middle
    of training. Raises ConfigError under `key` for the first file that is wrong.
    """
    budget, options = SMALL_CORPUS, _once(options)
    for path in _local(files):
        try:
            size = os.path.getsize(path)
            _check_form(path, size, key)
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot read {path!r} ({error.strerror}); check the path and its permissions"
            ) from None
        whole = size <= min(SMALL_FILE, budget)
        budget -= size if whole else 0
        try:
            _read(path, key, options, whole)
        except DataError as error:
            raise ConfigError(f"{key}: {error}") from None


def check_remote(files: list[str], *, key: str, options: ReadOptions) -> None:
    """The first and the last of the remote files can be read by ranges and hold text, as `check` finds it.

    A store must answer within seconds; one that says that it is busy is waited for as in training.
    Raises ConfigError under `key`.
    """
    # The shards of a dataset were opened when they were found.
    urls = [file for file in files if local_path(file) is None and not dataset_rows.is_shard(file)]
    options = options.first_look()
    for url in dict.fromkeys([*urls[:1], *urls[-1:]]):
        try:
            with RangeFile(url, options.for_a_while()) as file:
                size, head = file.stamp().size, file.read(4)
            _check_content(url, size, head or b"", key)
            _read(url, key, options, whole=size <= SMALL_FILE)
        except DataError as error:
            raise ConfigError(f"{key}: {error}") from None


def check_enough(
    files: list[str], tokenizer: Tokenizer, tokens_needed: int, *, key: str, options: ReadOptions | None = None
) -> None:
    """A local corpus holds at least `tokens_needed` tokens, eos after each document included.

    Nothing is read where the files' size alone answers, and reading stops as soon as enough was seen.
    Raises ConfigError under `key`, with the number of tokens there are.
    """
    paths = _near(files)
    if (
        len(paths) < len(files)
        or sum(os.path.getsize(dataset_rows.stored_at(path)) for path in paths) >= 4 * tokens_needed
    ):
        return
    tokens = count = 0
    try:
        for text in documents(paths, _once(options)):
            tokens += len(tokenizer.encode(text)) + 1
            count += 1
            if tokens >= tokens_needed:
                return
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    first = dataset_rows.stored_at(paths[0])
    where = f"{first!r} holds" if len(paths) == 1 else f"the {len(paths)} files from {first!r} on hold"
    raise ConfigError(
        f"{key}: {where} {tokens} tokens in {count} documents, fewer than the {tokens_needed} of one batch; "
        "give more text, or lower train.global_batch_size or data.seq_len"
    )


def check_lanes(files: list[str], lanes: int, *, key: str = "data.lanes") -> None:
    """Each lane gets at least one document: with F < lanes files each file is cut into ceil(lanes / F) shares.

    Raises ConfigError under `key` with the largest number of lanes that these files allow. Remote files are passed.
    """
    shares = -(-lanes // len(files))
    if shares == 1:
        return
    fewest, shortest = shares, ""
    for path in _near(files):
        try:
            rows = row_count(path, ReadOptions(retry_budget=0), fewest)
        except DataError as error:
            raise ConfigError(f"{key}: {error}") from None
        if rows < fewest:
            fewest, shortest = rows, dataset_rows.stored_at(path)
    if shortest:
        raise ConfigError(
            f"{key}: {lanes} lanes over {len(files)} files take {shares} documents from each, but {shortest!r} holds "
            f"{fewest}; set at most {fewest * len(files)} lanes, or give more text"
        )


def _local(files: list[str]) -> list[str]:
    return [path for file in files if (path := local_path(file)) is not None]


def _near(files: list[str]) -> list[str]:
    """Local files, and shards of a data set in one."""
    return [local_path(file) or file for file in files if local_path(dataset_rows.stored_at(file)) is not None]


def _check_form(path: str, size: int, key: str) -> None:
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{key}: {path!r} is not named like text we read; give files named {SUFFIXES_IN_WORDS}")
    with open(open_regular(path), "rb") as file:
        head = file.read(4)
    _check_content(path, size, head, key)


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
    """These options for local files, which are not tried again and leave nothing in the cache."""
    options = options or ReadOptions()
    return ReadOptions(
        retry_budget=0,
        max_document_bytes=options.max_document_bytes,
        text_column=options.text_column,
        filter=options.filter,
        map=options.map,
    )


def _read(path: str, key: str, options: ReadOptions, whole: bool) -> None:
    """Reads the first row, then with `whole` all others as far as a look's time goes."""
    options = options.for_a_while()
    assert options.until is not None
    rows = rows_from(path, 0, options)[1]
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{key}: {path!r} holds no document; leave it out or fetch it again")
    document_text(first, url=path, column=options.text_column)
    if whole:
        with suppress(LookEnded):
            for _ in rows:
                if time.monotonic() > options.until:
                    return
