"""Shards of tiny corpora, written without the program."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stablelm.data.formats.file_rows import texts
from stablelm.data.shards import shard_format
from stablelm.data.storage.options import ReadOptions
from stablelm.tokenizers.interface import document_tokens
from support.letters import LetterTokenizer


def write_shard(source: str, folder: Path, masked: tuple[int, ...] = ()) -> str:
    """The shard of a file in `folder`, with the rows `masked` left out; returns its path."""
    tokenizer = LetterTokenizer()

    def rows() -> Iterator[tuple[np.ndarray, int]]:
        for text in texts(source, ReadOptions(retry_budget=0, bad_rows="skip")):
            yield document_tokens(tokenizer, text), len((text or "").encode())

    folder.mkdir(exist_ok=True)
    path = folder / (Path(source).name + shard_format.SUFFIX)
    with path.open("wb") as file:
        footer = shard_format.write(
            file,
            rows(),
            source=Path(source).name,
            source_size=Path(source).stat().st_size,
            tokenizer=tokenizer.sha256,
            pieces=tokenizer.pieces,
            eos=tokenizer.eos,
        )
    if masked:
        bits = np.zeros(footer.rows, bool)
        bits[list(masked)] = True
        Path(shard_format.mask_url(str(path))).write_bytes(np.packbits(bits, bitorder="little").tobytes())
    return str(path)


def write_shards(sources: list[str], folder: Path) -> list[str]:
    return [write_shard(source, folder) for source in sources]
