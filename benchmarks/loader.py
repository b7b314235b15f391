"""How fast is the loader, beside loops that do less and beside datasets' streaming?

Streamed text, on one core: the bare loop reads each file with gzip, parses each line with json and encodes it, with no
order, no packing and no state; datasets gives documents by the thousand, which are encoded and packed into the same
batches. Of a tokenizer.json the base is a loop that calls the library's encode_batch, in the shape of the first.
All take turns in slices of a fraction of a second. Ratios are of wall time and of CPU time: the second
does not move when others use the core.

--two-cores: the loader and datasets with threads or processes on two cores, in passes in turns.

--prepared: how much of a numpy loop's speed over one file of tokens does the loader keep on prepared shards,
and how long does it take from a state anywhere in an epoch to the first batch? The loop takes rows that begin
anywhere, stacks and widens them and hands them to torch: no documents, no epochs, no state.

--resume-text: how long does it take from a state anywhere in one large json.gz to the first batch, and datasets
from its state to its first document?

    python benchmarks/loader.py --data DIR_OF_JSON_GZ --tokenizer FILE [--two-cores] [--out FILE.json]
"""

import argparse
import gzip
import json
import random
import tempfile
from pathlib import Path

import resume_text
import torch
from loader_contestants import BATCH, SEQ_LEN, on_one_core, on_two_cores
from loader_prepared import measure_prepared, measure_resume, write_shards
from loader_streaming import in_passes, in_slices, pin, record, records
from out_path import out_path

from stablelm.data.shards import shard_format
from stablelm.tokenizers import Tokenizer, load_tokenizer


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


def one_core(files: list[str], tokenizer: Tokenizer, cache: str, options: argparse.Namespace) -> list[dict]:
    contestants = on_one_core(files, tokenizer, cache)
    chosen = {name: each for name, each in contestants.items() if not options.only or name in options.only.split(",")}
    wall, cpu = in_slices(chosen, options.rounds)
    shape = f"{len(files)} files, {options.megabytes:g} MB, {SEQ_LEN}x{BATCH}, one core"
    base = next(iter(wall))
    return records(wall, shape, "wall", base=base) + records(cpu, shape, "cpu", base=base)


def two_cores(files: list[str], tokenizer: Tokenizer, cache: str, options: argparse.Namespace) -> list[dict]:
    contestants = on_two_cores(files, tokenizer, cache)
    shape = f"{len(files)} files, {options.megabytes:g} MB, {SEQ_LEN}x{BATCH}, two cores"
    rates = in_passes(contestants, options.rounds, int(options.megabytes * 1e6 / 8))
    return records(rates, shape, "wall", base=next(iter(contestants)))


def prepared(files: list[str], tokenizer: Tokenizer, folder: Path, rounds: int) -> list[dict]:
    flat, paths = folder / "all.bin", write_shards(files, tokenizer, folder)
    tokens = flat.stat().st_size // shard_format.token_type(tokenizer.pieces).itemsize
    return measure_prepared(paths, flat, tokenizer, rounds) + measure_resume(paths, tokenizer, tokens, rounds)


def resume_text_records(sources: list[Path], folder: Path, options: argparse.Namespace) -> list[dict]:
    rows = [json.loads(line) for file in sources for line in gzip.decompress(file.read_bytes()).splitlines()]
    tokenizer = load_tokenizer(options.tokenizer)
    times = resume_text.measure(rows, tokenizer, folder, megabytes=options.resume_text, rounds=options.rounds)
    shape = f"one json.gz of {options.resume_text:g} MB, one core"
    return [record(f"{who} at document {at}", shape, "resume", ms, "ms") for (who, at), ms in times.items()]


def show(records: list[dict], out: Path | None) -> None:
    for each in records:
        numbers = f"{each['median']:>14,.3f} ({each['low']:,.3f} to {each['high']:,.3f})"
        print(f"{each['name']:<30} {each['metric']:<18} {numbers} {each['unit']}")
    if out:
        out.write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with .json.gz files of documents")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model file or tokenizer.json")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=50.0, help="text after tiling")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", metavar="NAME,NAME", help="of the loops on one core; the first is the base")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--two-cores", action="store_true", help="with threads and processes on two cores")
    kinds.add_argument("--prepared", action="store_true", help="measure prepared shards instead of text")
    kinds.add_argument("--resume-text", type=float, metavar="MEGABYTES", help="resume in one json.gz of this size")
    parser.add_argument("--out", type=out_path, help="write the records here as JSON")
    options = parser.parse_args()
    pin(2 if options.two_cores else 1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), load_tokenizer(options.tokenizer)
        sources = sorted(options.data.glob("*train*.json.gz")) or sorted(options.data.glob("*.json.gz"))
        if options.resume_text:
            return show(resume_text_records(sources, folder, options), options.out)
        files = tile(sources, folder, files=options.files, megabytes=options.megabytes)
        if options.prepared:
            return show(prepared(files, tokenizer, folder, options.rounds), options.out)
        measure = two_cores if options.two_cores else one_core
        return show(measure(files, tokenizer, str(folder / "cache"), options), options.out)


if __name__ == "__main__":
    main()
