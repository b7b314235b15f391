"""From data.path to the files of prepared shards, and their checks before anything is created."""

import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.data.shards.shard_format import SUFFIX, mask_url, source_name
from stablelm.data.shards.shard_reader import PagedFile, TokenShard, read_mask
from stablelm.data.storage.options import ReadOptions, braces, files_alone, local_path
from stablelm.errors import ConfigError, DataError, Problems
from stablelm.json_text import parse
from stablelm.small_files import read_small

MANIFEST = "manifest.json"


class ShardEntry(TypedDict):
    """A shard in a manifest: the base name of its source, and the hash of its mask if it has one."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: Annotated[str, Field(max_length=4096, pattern=r"^[^/\x00]+$")]
    mask_sha256: NotRequired[str | None]


class ShardManifest(TypedDict):
    """What is read of the manifest of a folder of prepared shards."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    files: list[ShardEntry]


FORM = f"the folder that stablelm prepare wrote, or its *{SUFFIX} files"


def resolve(path: str | list[str], *, key: str, options: ReadOptions) -> list[str]:
    """Shards of `path`, sorted by the base name of their sources.

    Each entry is a folder that stablelm prepare finished, anywhere, or names *.tokens files, with globs where the
    store can list them, and braces everywhere. Raises ConfigError under `key` when an entry matches nothing, a
    folder is unfinished, or two shards are of the same source.
    """
    entries = [path] if isinstance(path, str) else list(path)
    files, problems = [], Problems()
    for entry in entries:
        with problems.collecting():
            files += _expand(entry, key, options)
    problems.raise_any()
    if not files:
        raise ConfigError(f"{key}: the list of shards is empty; give {FORM}")
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(source_name(file), file)
        if other != file:
            raise ConfigError(f"{key}: two shards are of {source_name(file)!r} ({other} and {file}); remove one")
    return sorted(by_name.values(), key=source_name)


def check(files: list[str], tokenizer: str, *, key: str) -> None:
    """Each local shard is complete and was made with this tokenizer (a hash), else ConfigError under `key`."""
    _open_local(files, tokenizer, key)


def check_enough(files: list[str], tokens_needed: int, *, key: str) -> None:
    """Local shards hold at least so many tokens, else ConfigError under `key` with the number there are."""
    shards = _open_local(files, None, key)
    held = 0
    for shard in shards:
        held += shard.count(tokens=tokens_needed - held)[0]
        if held >= tokens_needed:
            return
    if len(shards) == len(files):
        raise ConfigError(
            f"{key}: {len(files)} shard(s) from {files[0]!r} on hold {held} tokens, fewer than the {tokens_needed} of "
            "one batch; give more text, or lower train.global_batch_size or data.seq_len"
        )


def check_lanes(files: list[str], lanes: int) -> None:
    """Each lane gets a document of a local shard, else ConfigError under `data.lanes` with the most lanes possible."""
    shares = -(-lanes // len(files))
    if shares == 1:
        return
    counts = {shard.url: shard.count(documents=shares)[1] for shard in _open_local(files, None, "data.lanes")}
    shortest = min(counts, key=lambda url: counts[url], default=None)
    if shortest is not None and (rows := counts[shortest]) < shares:
        raise ConfigError(
            f"data.lanes: {lanes} lanes over {len(files)} files take {shares} documents from each, but {shortest!r} "
            f"holds {rows}; set at most {rows * len(files)} lanes, or give more text"
        )


def identity_names(files: list[str], *, options: ReadOptions) -> list[str]:
    """What the run's identity says of each shard: its source's base name, and the hash of its mask if it has one."""
    names = []
    for file in files:
        mask = read_mask(file, options=options)
        mark = "" if mask is None else f" masked {hashlib.sha256(mask).hexdigest()[:16]}"
        names.append(source_name(file) + mark)
    return names


def read_manifest(folder: str, *, options: ReadOptions) -> "ShardManifest | None":
    """The manifest of a folder that stablelm prepare finished; None for other folders. Raises DataError."""
    url = f"{folder.rstrip('/')}/{MANIFEST}"
    path = local_path(url)
    try:
        if path is None:
            content = PagedFile.whole(url, options=options)
        else:
            content = read_small(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror}); make it readable") from None
    try:
        return None if content is None else parse(content, ShardManifest)
    except ValueError as error:
        raise DataError(f"{url}: not a manifest of prepared shards ({error}); run stablelm prepare again") from None


def _expand(entry: str, key: str, options: ReadOptions) -> Iterable[str]:
    if entry.partition(":")[0] == "embedded":
        raise ConfigError(f"{key}: {entry!r} is text, and data.source is shards; give {FORM}")
    if entry.endswith(SUFFIX):
        found, problems = [], Problems()
        for pattern in braces(entry):
            with problems.collecting():
                found += _matching(pattern, key)
        problems.raise_any()
        return found
    try:
        manifest = read_manifest(entry, options=options)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    if manifest is None:
        raise ConfigError(f"{key}: {entry!r} has no {MANIFEST}, which stablelm prepare writes last; give {FORM}")
    folder = (os.path.expanduser(entry) if local_path(entry) else entry).rstrip("/")
    masks = {f"{folder}/{each['name']}{SUFFIX}": each.get("mask_sha256") for each in manifest["files"]}
    _check_masks({file: sha256 for file, sha256 in masks.items() if sha256 and local_path(file)}, key, options)
    return list(masks)


def _check_masks(sha256: dict[str, str], key: str, options: ReadOptions) -> None:
    """The masks of these local shards have the hashes in the manifest, else ConfigError."""
    for file, expected in sha256.items():
        try:
            mask = read_mask(file, options=options) or b""
        except DataError as error:
            raise ConfigError(f"{key}: {error}") from None
        if hashlib.sha256(mask).hexdigest() != expected:
            raise ConfigError(f"{key}: {mask_url(file)!r} is not the one that was written; run stablelm prepare again")


def _matching(pattern: str, key: str) -> list[str]:
    path = local_path(pattern)
    if path is not None:
        path = os.path.expanduser(path)
        found = glob.glob(path, recursive=True) if glob.has_magic(path) else [path]
        found = files_alone([file for file in found if os.path.lexists(file)], key, f"{pattern!r} matches")
    elif "*" not in pattern:
        return [pattern]
    elif pattern.startswith(("http://", "https://")):
        raise ConfigError(f"{key}: {pattern!r} has a '*', but a web server cannot be asked for its files; use braces")
    else:
        import fsspec

        try:
            filesystem, path = fsspec.url_to_fs(pattern)
            found = sorted(str(filesystem.unstrip_protocol(file)) for file in filesystem.glob(path))
        except Exception as error:  # every store's library has its own errors
            raise ConfigError(
                f"{key}: the store gave no list for {pattern!r} ({type(error).__name__}: {error}); try again"
            ) from error
    if not found:
        raise ConfigError(f"{key}: no shard matches {pattern!r}; give {FORM}")
    return found


def _open_local(files: list[str], tokenizer: str | None, key: str) -> list[TokenShard]:
    options, shards, problems = ReadOptions(retry_budget=0.0), [], Problems()
    for file in files:
        if local_path(file) is not None:
            with problems.collecting(key):
                shards.append(TokenShard(file, tokenizer=tokenizer, options=options))
    problems.raise_any()
    return shards
