"""Prepared shards against a numpy loop over one file of tokens, and a resume to the first batch (for `loader.py`)."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from loader_contestants import BATCH, SEQ_LEN
from loader_streaming import record

from stablelm.config.schema import DataConfig
from stablelm.data.formats.file_rows import documents
from stablelm.data.loader import Loader
from stablelm.data.shards import shard_format
from stablelm.data.storage.options import ReadOptions
from stablelm.tokenizers import Tokenizer
from stablelm.tokenizers.interface import document_tokens

STEPS = 100  # of a round


def write_shards(files: list[str], tokenizer: Tokenizer, folder: Path) -> list[str]:
    """A shard of each file, and `all.bin` with the tokens of them all."""
    paths = []
    with (folder / "all.bin").open("wb") as flat:

        def rows(file: str) -> Iterator[tuple[np.ndarray, int]]:
            for text in documents([file], ReadOptions(retry_budget=0)):
                tokens = document_tokens(tokenizer, text)
                flat.write(tokens.astype(shard_format.token_type(tokenizer.pieces)).tobytes())
                yield tokens, len(text.encode())

        for file in files:
            paths.append(f"{file}{shard_format.SUFFIX}")
            with open(paths[-1], "wb") as shard:
                named = {"source": Path(file).name, "source_size": Path(file).stat().st_size}
                identity = {"tokenizer": tokenizer.sha256, "pieces": tokenizer.pieces, "eos": tokenizer.eos}
                shard_format.write(shard, rows(file), **named, **identity)
    return paths


def memmap_batches(path: Path, kind: np.dtype) -> Iterator[torch.Tensor]:
    """int64 (BATCH, SEQ_LEN+1) of rows that begin anywhere."""
    tokens, draw = np.memmap(path, kind, mode="r"), random.Random(0)
    while True:
        starts = [draw.randrange(len(tokens) - SEQ_LEN) for _ in range(BATCH)]
        yield torch.from_numpy(np.stack([tokens[at : at + SEQ_LEN + 1] for at in starts]).astype(np.int64))


def measure_prepared(paths: list[str], flat: Path, tokenizer: Tokenizer, rounds: int) -> list[dict]:
    """Records of tokens a second in each round, in turns, and of the ratio to the numpy loop of the same round."""
    contestants: dict[str, Callable[[], object]] = {}
    bare = memmap_batches(flat, shard_format.token_type(tokenizer.pieces))
    contestants["numpy-memmap"] = lambda: next(bare)
    loaders = []
    for lanes in (len(paths), 8 * len(paths)):
        for workers in (0, 1):
            loaders.append(prepared_loader(paths, tokenizer, lanes=lanes, workers=workers))
            contestants[f"shards lanes={lanes} workers={workers}"] = loaders[-1].next
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                contestant()
            if turn:  # the first round warms up
                rates[name].append(STEPS * BATCH * SEQ_LEN / (time.perf_counter() - began))
    for each in loaders:
        each.close()
    shape = f"{len(paths)} shards, {SEQ_LEN}x{BATCH}, one core"
    records = []
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates["numpy-memmap"], strict=True)]
        records.append(record(name, shape, "tokens_per_second", values, "tokens/s"))
        records.append(record(name, shape, "wall_ratio", ratios, "of numpy-memmap"))
    return records


def measure_resume(paths: list[str], tokenizer: Tokenizer, tokens: int, rounds: int) -> list[dict]:
    """Records of the time from a state to the first batch, at several places of an epoch."""
    steps, records = tokens // (SEQ_LEN * BATCH), []
    each = prepared_loader(paths, tokenizer, lanes=8 * len(paths), workers=0)
    for step in range(steps):
        each.next()
        if step + 1 not in (1, steps // 4, steps // 2, steps * 3 // 4, steps):
            continue
        state, times = each.state(), []
        for _ in range(rounds):
            began = time.perf_counter()
            resumed = prepared_loader(paths, tokenizer, lanes=8 * len(paths), workers=0)
            resumed.load(state)
            resumed.next()
            times.append(1000 * (time.perf_counter() - began))
        records.append(record(f"shards at step {step + 1}", f"{steps} steps an epoch", "resume", times, "ms"))
    return records


def prepared_loader(paths: list[str], tokenizer: Tokenizer, *, lanes: int, workers: int) -> Loader:
    data = DataConfig(seq_len=SEQ_LEN, lanes=lanes, workers=workers)
    return Loader(paths, tokenizer, data, seed=0, global_batch_size=BATCH)
