"""English text out of the running Python: help topics, docstrings of the standard library and of the builtins."""

import ast
import builtins
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
TARGET = 1500  # characters after which a document of docstrings is closed
SHORTEST = 200  # characters of the shortest document
LONG_PARAGRAPH = 80  # characters from which a repeated paragraph is dropped


class Document(NamedTuple):
    text: str
    url: str


def documents() -> list[Document]:
    """Every document of this Python in a fixed order; each long paragraph occurs once in the whole.

    The help topics quote one another at length, so without this a held-out document would be known from training.
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
