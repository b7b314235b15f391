"""Ways to turn files of text into tokens: the loader, a bare loop, and datasets' streaming in its quicker forms.

Each is a generator function which yields, again and again, how many tokens it has made since the last time.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import orjson

from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.tokenizers import Tokenizer
from stablelm.tokenizers.location import HUGGING_FACE

SEQ_LEN, BATCH = 2048, 8
ROW = SEQ_LEN + 1
DOCUMENTS = 512  # of a call of the tokenizers library
Contestant = Callable[[], Iterator[int]]


def bare(files: list[str], tokenizer: Tokenizer, parse: Callable[[bytes], dict]) -> Iterator[int]:
    """gzip, one JSON object a line, encode: no order, no batches."""
    for file in files:
        with gzip.open(file) as lines:
            for line in lines:
                yield len(tokenizer.encode(parse(line)["text"])) + 1


def bare_batches(files: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    """gzip, one JSON object a line, the tokenizers library's own call for so many documents: no order, no batches."""
    library = _library(tokenizer)
    for file in files:
        with gzip.open(file) as lines:
            while texts := [json.loads(line)["text"] for line in islice(lines, DOCUMENTS)]:
                encodings = library.encode_batch(texts, add_special_tokens=False)
                yield sum(len(encoding.ids) + 1 for encoding in encodings)


def encoding_alone(files: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    """The library's call alone, on documents that are in memory."""
    library, texts = _library(tokenizer), []
    for file in files:
        with gzip.open(file) as lines:
            texts += [json.loads(line)["text"] for line in lines]
    while True:
        for first in range(0, len(texts), DOCUMENTS):
            encodings = library.encode_batch(texts[first : first + DOCUMENTS], add_special_tokens=False)
            yield sum(len(encoding.ids) + 1 for encoding in encodings)


def _library(tokenizer: Tokenizer) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.files()[HUGGING_FACE].decode())


def loader(files: list[str], tokenizer: Tokenizer, *, lanes: int, **options) -> Iterator[int]:
    """Batches of the loader, without end."""
    data = DataConfig(seq_len=SEQ_LEN, lanes=lanes, **options)
    each = Loader(files, tokenizer, data, seed=0, global_batch_size=BATCH)
    try:
        while True:
            each.next()
            yield SEQ_LEN * BATCH
    finally:
        each.close()


def _stream(files: list[str]):
    import datasets

    return datasets.load_dataset("json", data_files=files, split="train", streaming=True).select_columns(["text"])


def datasets_lists(files: list[str], tokenizer: Tokenizer, *, threads: int = 1) -> Iterator[int]:
    """Lists of 1,000 documents, encoded together or (0 threads) one by one, and packed."""
    pack = _Packer()
    for rows in _stream(files).iter(batch_size=1000):
        yield from pack.batches(encode(tokenizer, rows["text"], threads=threads))


def datasets_arrow(files: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    """Arrow tables of 1,000 documents."""
    pack = _Packer()
    for table in _stream(files).with_format("arrow").iter(batch_size=1000):
        column: Any = table["text"]  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield from pack.batches(encode(tokenizer, column.to_pylist()))


def datasets_workers(files: list[str], tokenizer: Tokenizer, *, workers: int) -> Iterator[int]:
    """Tokenized and packed in torch's worker processes, a batch a message; the rest of 1,000 documents is dropped."""
    from torch.utils.data import DataLoader

    def pack(rows: dict) -> dict:
        tokens = np.concatenate(encode(tokenizer, rows["text"]))
        return {"tokens": tokens[: len(tokens) // ROW * ROW].reshape(-1, ROW)}

    stream = _stream(files).map(pack, batched=True, batch_size=1000, remove_columns=["text"]).with_format("numpy")
    for batch in DataLoader(stream, batch_size=BATCH, num_workers=workers, prefetch_factor=4 if workers else None):  # pyright: ignore[reportArgumentType]
        yield len(batch["tokens"]) * SEQ_LEN


def encode(tokenizer: Tokenizer, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
    """Ids of each text with eos, int32: together is what tokenizers do fastest; 0 threads: one by one."""
    if not threads:
        return [tokenizer.encode_arrays([text])[0] for text in texts]
    return tokenizer.encode_arrays(texts, threads=threads)


class _Packer:
    """Documents joined with eos and cut into int64 (BATCH, SEQ_LEN+1)."""

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.int32)

    def batches(self, parts: list[np.ndarray]) -> Iterator[int]:
        waiting, size = [self._rest], len(self._rest)
        for part in parts:
            waiting.append(part)
            size += len(part)
            if size < ROW * BATCH:
                continue
            tokens = np.concatenate(waiting)
            tokens[: ROW * BATCH].reshape(BATCH, ROW).astype(np.int64)
            waiting, size = [tokens[ROW * BATCH :]], size - ROW * BATCH
            yield SEQ_LEN * BATCH
        self._rest = np.concatenate(waiting)


def on_one_core(files: list[str], tokenizer: Tokenizer, cache: str) -> dict[str, Contestant]:
    """By name, the bare loop first. Each lane has files of its own, as with all of C4.

    Of a tokenizer.json the bare loop is that of the library's own calls.
    """
    batches: dict[str, Contestant] = {
        "encode_batch loop": lambda: bare_batches(files, tokenizer),
        "encode_batch alone": lambda: encoding_alone(files, tokenizer),
    }
    return (batches if HUGGING_FACE in tokenizer.files() else {}) | {
        "gzip-json loop": lambda: bare(files, tokenizer, json.loads),
        "gzip-orjson loop": lambda: bare(files, tokenizer, orjson.loads),
        "datasets lists": lambda: datasets_lists(files, tokenizer),
        "datasets lists, one by one": lambda: datasets_lists(files, tokenizer, threads=0),
        "datasets arrow": lambda: datasets_arrow(files, tokenizer),
        "loader": lambda: loader(files, tokenizer, lanes=len(files), workers=0, cache=cache),
    }


def on_two_cores(files: list[str], tokenizer: Tokenizer, cache: str) -> dict[str, Contestant]:
    """By name; the first is the loader with one core's work."""

    def ours(**options) -> Contestant:
        return lambda: loader(files, tokenizer, lanes=len(files), cache=cache, **options)

    return {
        "loader workers=0": ours(workers=0),
        "loader thread workers=1": ours(workers=1),
        "loader thread workers=2": ours(workers=2),
        "loader thread workers=3 prefetch=32": ours(workers=3, prefetch=32),
        "loader process workers=2": ours(workers=2, worker_kind="process", prefetch=4),
        "datasets lists": lambda: datasets_lists(files, tokenizer),
        "datasets lists, 2 threads": lambda: datasets_lists(files, tokenizer, threads=2),
        "datasets DataLoader workers=1": lambda: datasets_workers(files, tokenizer, workers=1),
        "datasets DataLoader workers=2": lambda: datasets_workers(files, tokenizer, workers=2),
    }
