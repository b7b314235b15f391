"""Tiny corpora and a tokenizer without a model file."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class LetterTokenizer:
    """One token a character; eos is 0. Enough to follow each token through packing."""

    path, pieces, eos, unknown, sha256 = "letters", 1 << 16, 0, -1, "letters"
    bos: int | None = None
    add_bos: bool = False

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        return [np.array([*self.encode(text), self.eos], np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(map(chr, ids))

    def vocabulary(self) -> dict[str, int]:
        return {chr(token): token for token in range(self.pieces)}

    def files(self) -> dict[str, bytes]:
        return {}


def write_rows(path: Path, texts: list[str]) -> str:
    """A .json or .json.gz file with one document a line."""
    data = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return str(path)


def write_corpus(folder: Path, rows: list[int]) -> list[str]:
    """One file for each number of rows; documents are unique, of 0 to about 60 letters, and say where they are from."""
    files = []
    for index, count in enumerate(rows):
        texts = [f"{index}:{row}" + "x" * (row * 7 % 53) + "." for row in range(count)]
        suffix = ".json.gz" if index % 2 else ".json"
        files.append(write_rows(folder / f"part-{index:05d}{suffix}", texts))
    return files


def given_chunks(chunks: Iterator[Any]) -> Any:
    """Something that packing takes its tokens from, which gives these chunks."""

    class Given:
        def next_chunk(self) -> Any:
            return next(chunks)

    return Given()
