"""The corpus that needs no network: English text that comes with every CPython, written once in C4's format.

It is the help topics of `pydoc_data.topics` and the docstrings of the standard library, about 2 MB, under the
Python Software Foundation License. It differs from one version of Python to the next, so a hash of the text is
part of the files' names. The sources are parsed, never imported.
"""

import ast
import builtins
import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stablelm.errors import ConfigError
from stablelm.new_files import write_durably
from stablelm.tokenizers.training import sample_lines, train

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
TARGET = 1500  # characters after which a document of docstrings is closed
SHORTEST = 200  # characters of the shortest document
LONG_PARAGRAPH = 80  # characters from which a repeated paragraph is dropped


class Document(NamedTuple):
    text: str
    url: str


def stdlib_documents() -> list[Document]:
    """Every document of this Python in a fixed order; each long paragraph occurs once in the whole.

    The help topics quote one another at length, so without this a validation document would occur in the training text.
    Empty where the standard library has no source files.
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = [document for path in _sources(library) for document in _module(path, library)]
    if not modules:
        return []
    return list(_without_repeats([*_topics(), *_builtin_types(), *modules]))


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name].strip(), f"pydoc:topics/{name}")


def _builtin_types() -> Iterator[Document]:
    """Builtin types and functions are written in C: their docstrings are in no source file."""
    functions = []
    for name, value in sorted(vars(builtins).items()):
        # site adds objects of its own, and exceptions of other modules may be aliases.
        if getattr(value, "__module__", "") != "builtins" or not isinstance(value.__doc__, str):
            continue
        if isinstance(value, type):
            methods = sorted((n, m) for n, m in vars(value).items() if not n.startswith("_"))
            texts = [(f"{name}.{n}", m.__doc__) for n, m in methods if isinstance(m.__doc__, str)]
            yield from _joined([(name, value.__doc__), *texts], f"pydoc:builtins/{name}")
        else:
            functions.append((name, value.__doc__))
    yield from _joined(functions, "pydoc:builtins/functions")


def _sources(library: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-"))
        # Files named so are written when Python is built: they differ from machine to machine.
        yield from (Path(folder, n) for n in sorted(names) if n.endswith(".py") and not n.startswith("_sysconfig"))


def _module(path: Path, library: Path) -> Iterator[Document]:
    parts = path.relative_to(library).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and samples of broken code are not text
    yield from _joined(list(_docstrings(tree, name)), f"pydoc:{name}")


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and of all inside it, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield name, text.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):
            yield from _docstrings(child, name)


def _joined(texts: list[tuple[str, str]], url: str) -> Iterator[Document]:
    """Docstrings under their names, gathered into documents of about TARGET characters."""
    part: list[str] = []
    index = 0
    for name, text in texts:
        part.append(f"{name}\n{text.strip()}")
        if sum(map(len, part)) >= TARGET:
            yield Document("\n\n".join(part), f"{url}#{index}")
            part, index = [], index + 1
    if part:
        yield Document("\n\n".join(part), f"{url}#{index}")


def _without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        kept = []
        # Escapes in sources may stand for lone surrogates, which UTF-8 cannot hold.
        for paragraph in document.text.encode("utf-8", "replace").decode().split("\n\n"):
            core = " ".join(paragraph.split())
            if len(core) >= LONG_PARAGRAPH and core in seen:
                continue
            seen.add(core)
            kept.append(paragraph)
        text = "\n\n".join(kept).strip()
        if len(text) >= SHORTEST:
            yield Document(text, document.url)


RECIPE = 1  # raised with every change of the files' content, so that old caches are not taken for new ones
TRAIN_FILES = 8
VALIDATION_SHARE = 20  # every twentieth document, by the hash of its text
PIECES = 4096
KEY = "data.cache"


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Paths of the embedded corpus: `train` and `validation` are json.gz files, `tokenizer` a .model file."""

    train: list[str]
    validation: list[str]
    tokenizer: str


def embedded(cache: str) -> EmbeddedCorpus:
    """The corpus in the folder `cache`, built at the first call (some ten seconds).

    Safe to call from many processes: one builds under a lock, in a temporary folder that is renamed when
    complete; the others wait. A finished corpus is also found in a cache that cannot be written.

    Raises ConfigError when the cache cannot be written or this Python has no sources.
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


def _found(final: Path) -> EmbeddedCorpus:
    train_files = sorted(str(path) for path in final.glob("*-train.*.json.gz"))
    validation = sorted(str(path) for path in final.glob("*-validation.*.json.gz"))
    model = final / "tokenizer.model"
    if len(train_files) != TRAIN_FILES or len(validation) != 1 or not model.is_file():
        raise ConfigError(f"{KEY}: files are missing from {str(final)!r}; delete this folder to have it built again")
    return EmbeddedCorpus(train_files, validation, str(model))


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
    documents = stdlib_documents()
    if len(documents) < VALIDATION_SHARE * TRAIN_FILES:
        raise ConfigError(
            f"data.path: 'embedded' needs the sources of the standard library, and this Python "
            f"({_python()}) has none; install them or use other files"
        )
    # Sorted by hash: an order that is mixed, and the same for the same text.
    keyed = sorted((hashlib.sha256(document.text.encode()).digest(), document) for document in documents)
    whole = hashlib.sha256(b"".join(digest for digest, _ in keyed)).hexdigest()
    validation = [d for digest, d in keyed if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0]
    training = [d for digest, d in keyed if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE != 0]
    stem = f"{_python()}-{whole[:8]}"
    for index in range(TRAIN_FILES):
        name = f"{stem}-train.{index:05d}-of-{TRAIN_FILES:05d}.json.gz"
        write_durably(folder / name, _lines(training[index::TRAIN_FILES]))
    write_durably(folder / f"{stem}-validation.00000-of-00001.json.gz", _lines(validation))
    lines = sample_lines((document.text for document in training), 1_000_000, seed=0)
    write_durably(folder / "tokenizer.model", train(lines, vocab_size=PIECES))


def _lines(documents: list[Document]) -> bytes:
    """C4's form: compact JSON in raw UTF-8, one object a line; mtime 0 makes equal text equal bytes."""
    lines = []
    for document in documents:
        record = {"text": document.text, "timestamp": "1970-01-01T00:00:00Z", "url": document.url}
        lines.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    return gzip.compress("".join(lines).encode(), mtime=0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on `path`; gives False where the system has none, since the rename is atomic anyway."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems know no locks
            alone = False
        yield alone


def _python() -> str:
    return f"{platform.python_implementation().lower().replace('cpython', 'python')}-{platform.python_version()}"
