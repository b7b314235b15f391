"""The corpus that needs no network: English text that every CPython carries, written once in C4's own form.

It is the help topics of `pydoc_data.topics` and the docstrings of the standard library, about 2 MB, under the
Python Software Foundation License. It differs from one version of Python to the next, so a hash of the text is
part of the files' names. The sources are parsed, never imported.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stablelm.data import stdlib_text
from stablelm.data.tokenizer import sample_lines, train
from stablelm.errors import ConfigError

RECIPE = 1  # raised with every change of the files' content, so that old caches are not taken for new ones
TRAIN_FILES = 8
VALIDATION_SHARE = 20  # every twentieth document, by the hash of its text
PIECES = 4096
KEY = "data.cache"


@dataclass(frozen=True)
class Embedded:
    """Paths of the embedded corpus: `train` and `validation` are json.gz files, `tokenizer` a .model file."""

    train: list[str]
    validation: list[str]
    tokenizer: str


def embedded(cache: str) -> Embedded:
    """The corpus in the folder `cache`, built at the first call (some ten seconds).

    Safe to call from many processes: one builds under a lock, in a temporary folder that is renamed when
    complete; the others wait. A finished corpus is also found in a cache that cannot be written.

    Raises ConfigError when the cache cannot be written or this Python carries no sources.
    """
    root = Path(cache).expanduser()
    final = root / f"embedded-{_python()}-{RECIPE}"
    if not final.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f".{final.name}.lock") as alone:
                if not final.is_dir():
                    _build(final, alone)
        except OSError as error:
            raise ConfigError(
                f"{KEY}: cannot write the embedded corpus to {cache!r} ({error.strerror or error}); "
                "give a folder that can be written, with 10 MB free"
            ) from None
    return _found(final)


def _found(final: Path) -> Embedded:
    train_files = sorted(str(path) for path in final.glob("*-train.*.json.gz"))
    validation = sorted(str(path) for path in final.glob("*-validation.*.json.gz"))
    model = final / "tokenizer.model"
    if len(train_files) != TRAIN_FILES or len(validation) != 1 or not model.is_file():
        raise ConfigError(f"{KEY}: files are missing from {str(final)!r}; delete this folder, it will be made again")
    return Embedded(train_files, validation, str(model))


def _build(final: Path, alone: bool) -> None:
    # What a killed build left; without the lock it may be another's work.
    for stale in final.parent.glob(f".{final.name}-*") if alone else ():
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        _write(staging)
        staging.chmod(0o755)
        os.rename(staging, final)
    except OSError as error:
        # Where the lock does not work, another process may have been first: its corpus is as good.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path) -> None:
    documents = stdlib_text.documents()
    if len(documents) < VALIDATION_SHARE * TRAIN_FILES:
        raise ConfigError(
            f"data.path: 'embedded' needs the sources of the standard library, and this Python "
            f"({_python()}) has none; install them or give files of your own"
        )
    # Sorted by hash: an order that is mixed, and the same for the same text.
    keyed = sorted((hashlib.sha256(document.text.encode()).digest(), document) for document in documents)
    whole = hashlib.sha256(b"".join(digest for digest, _ in keyed)).hexdigest()
    validation = [d for digest, d in keyed if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0]
    training = [d for digest, d in keyed if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE != 0]
    stem = f"{_python()}-{whole[:8]}"
    for index in range(TRAIN_FILES):
        name = f"{stem}-train.{index:05d}-of-{TRAIN_FILES:05d}.json.gz"
        _write_file(folder / name, _lines(training[index::TRAIN_FILES]))
    _write_file(folder / f"{stem}-validation.00000-of-00001.json.gz", _lines(validation))
    lines = sample_lines((document.text for document in training), 1_000_000, seed=0)
    _write_file(folder / "tokenizer.model", train(lines, vocab_size=PIECES))


def _lines(documents: list[stdlib_text.Document]) -> bytes:
    """C4's form: compact JSON in raw UTF-8, one object a line; mtime 0 makes equal text equal bytes."""
    lines = []
    for document in documents:
        record = {"text": document.text, "timestamp": "1970-01-01T00:00:00Z", "url": document.url}
        lines.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    return gzip.compress("".join(lines).encode(), mtime=0)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on `path`; gives False where the system has none, since the rename is atomic anyway."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems know no locks
            alone = False
        yield alone


def _python() -> str:
    return f"{platform.python_implementation().lower().replace('cpython', 'python')}-{platform.python_version()}"
