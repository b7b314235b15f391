"""How much of a bare loop's speed does the loader keep?

The bare loop reads each file with gzip, parses each line with json and encodes it: no order, no packing,
no state. Both run on one core over the same documents, in turns. Ratios are given of wall time and of
CPU time: the first counts waiting for threads, the second does not move when others use the core as well.

    python benchmarks/loader.py --data DIR_OF_JSON_GZ --tokenizer FILE.model [--out FILE.json]
"""

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import torch

from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.data.tokenizer import Tokenizer

SEQ_LEN, BATCH = 2048, 8


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
            spread = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
            records.append({"name": name, "shape": shape, "metric": metric, **spread, "unit": unit})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with .json.gz files of documents")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model file")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=50.0, help="text after tiling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the records here as JSON")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(options.data.glob("*train*.json.gz")) or sorted(options.data.glob("*.json.gz"))
        files = tile(sources, Path(folder), files=options.files, megabytes=options.megabytes)
        rates = measure(files, Tokenizer(options.tokenizer), options.rounds)
    records = summarise(rates, f"{options.files} files, {options.megabytes:g} MB, {SEQ_LEN}x{BATCH}, one core")
    for record in records:
        numbers = f"{record['median']:>14,.3f} ({record['low']:,.3f} to {record['high']:,.3f})"
        print(f"{record['name']:<30} {record['metric']:<18} {numbers} {record['unit']}")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
