"""How much of a bare loop's speed does the loader keep?

The bare loop reads each file with gzip, parses each line with json and encodes it: no order, no packing,
no state. Both run on one core over the same documents, in turns. Ratios are given of wall time and of
CPU time: the first counts waiting for threads, the second does not move when others use the core as well.

With --prepared: how much of a numpy loop's speed over one file of tokens does the loader keep on prepared shards,
and how long does it take from a state anywhere in an epoch to the first batch? The loop takes rows that begin
anywhere, stacks and widens them and hands them to torch: no documents, no epochs, no state.

    python benchmarks/loader.py --data DIR_OF_JSON_GZ --tokenizer FILE.model [--prepared] [--out FILE.json]
"""

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
import torch

from stablelm.config.schema import DataConfig
from stablelm.data import shards
from stablelm.data.encoding import document_tokens
from stablelm.data.loader import Loader
from stablelm.data.options import ReadOptions
from stablelm.data.source import documents
from stablelm.data.tokenizer import Tokenizer

SEQ_LEN, BATCH = 2048, 8
STEPS = 100  # of a round on prepared shards


def tile(sources: list[Path], folder: Path, *, files: int, megabytes: float) -> list[str]:
    """The documents again and again until their text has this size, in a fresh order each time, dealt to files."""
    rows = [json.loads(line) for file in sources for line in gzip.decompress(file.read_bytes()).splitlines()]
    copies = max(1, round(megabytes * 1e6 / sum(len(row["text"].encode()) for row in rows)))
    names = [folder / f"tiled.{index:05d}-of-{files:05d}.json.gz" for index in range(files)]
    parts: list[list[bytes]] = [[] for _ in names]
    for copy in range(copies):
        order = random.Random(copy).sample(rows, len(rows))
        for index, row in enumerate(order):
            line = json.dumps({**row, "url": f"{row['url']}#{copy}"}, ensure_ascii=False, separators=(",", ":"))
            parts[index % files].append(line.encode() + b"\n")
    for name, lines in zip(names, parts, strict=True):
        name.write_bytes(gzip.compress(b"".join(lines), 6))
    return [str(name) for name in names]


def bare(files: list[str], tokenizer: Tokenizer, parse: Callable[[bytes], dict]) -> int:
    """Tokens, eos counted, of all documents."""
    tokens = 0
    for file in files:
        with gzip.open(file) as lines:
            for line in lines:
                tokens += len(tokenizer.encode(parse(line)["text"])) + 1
    return tokens


def load(files: list[str], tokenizer: Tokenizer, tokens: int, *, lanes: int, workers: int) -> int:
    """Tokens of as many batches as one epoch holds."""
    data = DataConfig(seq_len=SEQ_LEN, lanes=lanes, workers=workers)
    loader = Loader(files, tokenizer, data, seed=0, global_batch_size=BATCH)
    steps = tokens // (SEQ_LEN * BATCH)
    for _ in range(steps):
        loader.next()
    loader.close()
    return steps * SEQ_LEN * BATCH


def measure(files: list[str], tokenizer: Tokenizer, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(tokens a second, tokens a CPU second) of each contestant in each round."""
    tokens = bare(files, tokenizer, json.loads)
    contestants: dict[str, Callable[[], int]] = {
        "plain-gzip-json": lambda: bare(files, tokenizer, json.loads),
        "plain-gzip-orjson": lambda: bare(files, tokenizer, orjson.loads),
    }
    for lanes in (len(files), 8 * len(files)):
        for workers in (0, 1):
            name = f"loader lanes={lanes} workers={workers}"
            contestants[name] = lambda lanes=lanes, workers=workers: load(
                files, tokenizer, tokens, lanes=lanes, workers=workers
            )
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            done = contestant()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            rates[name].append((done / wall, done / cpu))
    return rates


def write_shards(files: list[str], tokenizer: Tokenizer, folder: Path) -> list[str]:
    """A shard of each file, and `all.bin` with the tokens of them all."""
    paths = []
    with (folder / "all.bin").open("wb") as flat:

        def rows(file: str) -> Iterator[tuple[np.ndarray, int]]:
            for text in documents([file], ReadOptions(retry_budget=0)):
                tokens = document_tokens(tokenizer, text)
                flat.write(tokens.astype(shards.token_type(tokenizer.pieces)).tobytes())
                yield tokens, len(text.encode())

        for file in files:
            paths.append(f"{file}{shards.SUFFIX}")
            with open(paths[-1], "wb") as shard:
                named = {"source": Path(file).name, "source_size": Path(file).stat().st_size}
                identity = {"tokenizer": tokenizer.sha256, "pieces": tokenizer.pieces, "eos": tokenizer.eos}
                shards.write(shard, rows(file), **named, **identity)
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
    bare = memmap_batches(flat, shards.token_type(tokenizer.pieces))
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


def record(name: str, shape: str, metric: str, numbers: list[float], unit: str) -> dict:
    spread = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
    return {"name": name, "shape": shape, "metric": metric, **spread, "unit": unit}


def summarise(rates: dict[str, list[tuple[float, float]]], shape: str) -> list[dict]:
    """Rates, and their ratios to the bare json loop of the same round."""
    floor = rates["plain-gzip-json"]
    records = []
    for name, values in rates.items():
        columns = {
            "tokens_per_second": ([wall for wall, _ in values], "tokens/s"),
            "wall_ratio": (
                [value[0] / base[0] for value, base in zip(values, floor, strict=True)],
                "of plain-gzip-json",
            ),
            "cpu_ratio": (
                [value[1] / base[1] for value, base in zip(values, floor, strict=True)],
                "of plain-gzip-json",
            ),
        }
        for metric, (numbers, unit) in columns.items():
            records.append(record(name, shape, metric, numbers, unit))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with .json.gz files of documents")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model file")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=50.0, help="text after tiling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepared", action="store_true", help="measure prepared shards instead of text")
    parser.add_argument("--out", type=Path, help="write the records here as JSON")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(options.data.glob("*train*.json.gz")) or sorted(options.data.glob("*.json.gz"))
        files = tile(sources, Path(folder), files=options.files, megabytes=options.megabytes)
        tokenizer = Tokenizer(options.tokenizer)
        if options.prepared:
            flat = Path(folder) / "all.bin"
            paths = write_shards(files, tokenizer, Path(folder))
            tokens = flat.stat().st_size // shards.token_type(tokenizer.pieces).itemsize
            records = measure_prepared(paths, flat, tokenizer, options.rounds)
            records += measure_resume(paths, tokenizer, tokens, options.rounds)
        else:
            rates = measure(files, tokenizer, options.rounds)
            shape = f"{options.files} files, {options.megabytes:g} MB, {SEQ_LEN}x{BATCH}, one core"
            records = summarise(rates, shape)
    for each in records:
        numbers = f"{each['median']:>14,.3f} ({each['low']:,.3f} to {each['high']:,.3f})"
        print(f"{each['name']:<30} {each['metric']:<18} {numbers} {each['unit']}")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
