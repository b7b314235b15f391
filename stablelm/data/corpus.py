"""What a configuration names: its paths (file, glob, folder, URL, list, 'embedded') as ordered files, its tokenizer."""

import glob
import os
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

from stablelm.config.schema import DataConfig
from stablelm.config.secret_rules import advice
from stablelm.data.embedded import embedded
from stablelm.data.formats import dataset_files
from stablelm.data.formats.file_rows import SUFFIXES, SUFFIXES_IN_WORDS
from stablelm.data.formats.text_lines import is_plain_text
from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions, base_name, braces, files_alone, local_path
from stablelm.data.storage.retry import persist
from stablelm.errors import ConfigError, DataError, Problems, listed
from stablelm.redaction import carries_secret, redacted
from stablelm.tokenizers import Tokenizer, load_tokenizer

TRAINING_KEYS = ("data.path", "--source")
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")


def configured_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration, which may be that of the embedded corpus. Raises ConfigError."""
    path = embedded(data.cache).tokenizer if data.tokenizer == "embedded" else data.tokenizer
    return load_tokenizer(path, add_bos=data.add_bos, eos_token=data.eos_token)


def resolve(path: str | list[str], *, key: str, cache: str, options: ReadOptions | None = None) -> list[str]:
    """Files of `path`, sorted by base name: local ones as plain paths, all else as URLs for fsspec.

    Each entry is a file, a glob, a folder (its files with one of SUFFIXES, plain text only where it has no others),
    an http(s) URL, a file, glob or folder in an object store (s3://, gs://, az://), an `hf://datasets/...` pattern, a
    data set as `datasets://...` (see `dataset_files`) or 'embedded'.
    Shell braces such as {00000..01023} or {a,b} are expanded everywhere, which is how many files at an
    http server are named. 'embedded' is the training split under TRAINING_KEYS and the validation split
    elsewhere; 'embedded:train' and 'embedded:validation' choose a split. `cache` is the folder of the embedded
    corpus; `options` are used to list the files of a store.

    Raises ConfigError under `key`, a line for each entry that matches nothing or something other than files, or when
    two files share a base name, since base names decide the order of the text.
    """
    entries = [path] if isinstance(path, str) else list(path)
    if not entries:
        raise ConfigError(f"{key}: the list is empty; give at least one file, glob, folder or URL")
    problems = Problems()
    files: list[str] = []
    for entry in entries:
        with problems.collecting():
            files += _expand(entry, key, cache, options or ReadOptions())
    problems.raise_any()
    by_name: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_name[base_name(file)].append(file)
    for name, same in by_name.items():
        if len(same) > 1:
            raise ConfigError(
                f"{key}: two files have the base name {name!r} ({same[0]} and {same[1]}); rename or remove one"
            )
    return sorted(files, key=base_name)


def is_local(url: str) -> bool:
    """Whether `url` is a path of the local file system."""
    return local_path(url) is not None


def _expand(entry: str, key: str, cache: str, options: ReadOptions) -> list[str]:
    if not entry:
        raise ConfigError(f"{key}: the path is empty; give a file, glob, folder or URL, or 'embedded'")
    if entry.partition(":")[0] == "embedded" and not os.path.exists(entry):
        return _embedded(entry, key=key, cache=cache)
    if entry.startswith(dataset_files.PREFIX):
        return dataset_files.expand(entry, key=key, options=options)
    if (path := local_path(entry)) is not None:
        return _local(path, key=key)
    urls = _remote(entry, key, options)
    for url in urls:
        if not base_name(url).endswith(SUFFIXES):
            raise ConfigError(f"{key}: {url!r} is of an unsupported file type; give files named {SUFFIXES_IN_WORDS}")
    return urls


def _remote(entry: str, key: str, options: ReadOptions) -> list[str]:
    scheme = entry.partition("://")[0]
    if carries_secret(entry):
        raise ConfigError(
            f"{key}: {redacted(entry)!r} has a password, token or signature in it, which would be written where files "
            f"are named; set {advice(entry)} in the environment"
        )
    if scheme == "hf":
        from stablelm.data.storage import hub  # with the clients of web servers and of the hub

        return [file for url in braces(entry) for file in hub.expand(url, key=key)]
    if scheme in OBJECT_STORES:
        if sentence := stores.missing_package(entry):
            raise ConfigError(f"{key}: {sentence}")
        return [file for url in braces(entry) for file in _objects(url, key, options)]
    if scheme not in ("http", "https"):
        raise ConfigError(
            f"{key}: {entry!r} is in an unsupported store; give a local path, http(s)://, hf://, s3://, gs:// or az://"
        )
    if "*" in urlsplit(entry).path:
        raise ConfigError(
            f"{key}: {entry!r} has a '*', but a web server cannot be asked for its files; "
            "write the names with braces, as in c4-train.{00000..01023}-of-01024.json.gz"
        )
    return braces(entry)


def _objects(url: str, key: str, options: ReadOptions) -> list[str]:
    """Files of a glob or folder in an object store; a URL with a file's suffix is not looked up."""
    if "*" not in url and "?" not in url and base_name(url).endswith(SUFFIXES):
        return [url]
    pattern = url if glob.has_magic(url) else url.rstrip("/") + "/*"
    try:
        found = persist(
            lambda: stores.glob(pattern, options),
            name=pattern,
            budget=options.retry_budget,
            first_answer=options.first_answer,
        )
    except DataError as error:
        raise ConfigError(f"{key}: the files of {url!r} cannot be listed: {error}") from error
    files = _text_of(found)
    if not files:
        raise ConfigError(f"{key}: nothing in the store matches {pattern!r}; give files named {SUFFIXES_IN_WORDS}")
    return files


def _embedded(entry: str, *, key: str, cache: str) -> list[str]:
    split = entry.partition(":")[2] or ("train" if key in TRAINING_KEYS else "validation")
    if split not in ("train", "validation"):
        raise ConfigError(f"{key}: {entry!r} is not a split; write 'embedded:train' or 'embedded:validation'")
    corpus = embedded(cache)
    return corpus.train if split == "train" else corpus.validation


def _local(entry: str, *, key: str) -> list[str]:
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        found = _text_of([str(p) for p in Path(path).iterdir()])
        if not found:
            raise ConfigError(
                f"{key}: the folder {entry!r} holds no file named {SUFFIXES_IN_WORDS}; give the one with the text"
            )
        return files_alone(found, key, f"the folder {entry!r} holds")
    if os.path.exists(path):
        return [path]
    here = f"check the path, looked up from {os.getcwd()}"
    patterns = [path] if os.path.lexists(path) else braces(path)
    if patterns == [path] and not glob.has_magic(path) and not os.path.lexists(path):
        raise ConfigError(f"{key}: {entry!r} does not exist; {here}")
    matches = {
        pattern: [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True) for pattern in patterns
    }
    # A glob may also match folders that nobody takes for text.
    found = {
        pattern: [match for match in matched if not os.path.isdir(match) or _wanted(os.path.basename(match))]
        for pattern, matched in matches.items()
    }
    missing = [pattern for pattern, matched in found.items() if not matched]
    if missing:
        raise ConfigError(f"{key}: no file matches {listed(missing)}; {here}")
    return files_alone([match for matched in found.values() for match in matched], key, f"{entry!r} matches")


def _text_of(files: list[str]) -> list[str]:
    """The files of a folder with one of SUFFIXES; plain text only without others, beside which it is notes."""
    wanted = [file for file in files if _wanted(base_name(file))]
    return [file for file in wanted if not is_plain_text(file)] or wanted


def _wanted(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")
