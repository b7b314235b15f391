"""From a state inside one large json.gz to the first batch; `datasets` to its first document (for `loader.py`)."""

import json
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stablelm.config.schema import DataConfig
from stablelm.data.formats.text_lines import lines_from
from stablelm.data.loader import Loader
from stablelm.data.order import Cursor
from stablelm.data.storage.options import ReadOptions
from stablelm.tokenizers import Tokenizer

LANES = 8
PARTS = (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)
"""Places of the file, in shares of its documents."""


def write(rows: list[dict], path: Path, megabytes: float) -> int:
    """The documents in a fresh order again and again, as one gzip member of this size; returns their number."""
    packer, draw, count = zlib.compressobj(3, zlib.DEFLATED, 31), random.Random(0), 0
    with path.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            lines = (json.dumps({**row, "url": f"{row['url']}#{count + n}"}) for n, row in enumerate(rows))
            file.write(packer.compress("".join(f"{line}\n" for line in lines).encode()))
            count += len(rows)
            draw.shuffle(rows)
        file.write(packer.flush())
    return count


def measure(rows: list[dict], tokenizer: Tokenizer, folder: Path, *, megabytes: float, rounds: int) -> dict:
    """Milliseconds of each round, by (reader, place), all in turns."""
    path, cache = folder / "large.json.gz", str(folder / "cache")
    count = write(rows, path, megabytes)
    read = sum(1 for _ in lines_from(str(path), 0, ReadOptions(cache=cache))[1])  # leaves the index behind
    assert read == count
    places = [int(part * count) for part in PARTS]
    contestants: dict[tuple[str, int], Callable[[], object]] = {}
    for place in places:
        contestants["stablelm", place] = lambda place=place: first_batch(str(path), tokenizer, place, cache)
    for place, state in states(path, places):
        contestants["datasets", place] = lambda state=state: first_document(path, state)
    times: dict[tuple[str, int], list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            times[name].append(1000 * (time.perf_counter() - began))
    return times


def first_batch(path: str, tokenizer: Tokenizer, place: int, cache: str) -> None:
    """Every lane goes on from the beginning of the block that holds this row."""
    data = DataConfig(seq_len=2048, lanes=LANES, workers=0, cache=cache)
    block = place // (LANES * data.shuffle_block)
    lanes = {str(lane): Cursor(0, lane, block, 0, 0).to_list() for lane in range(LANES)}
    loader = Loader([path], tokenizer, data, seed=0, global_batch_size=LANES)
    loader.load({"data_step": 1000, "lanes": lanes})
    loader.next()
    loader.close()


def states(path: Path, places: list[int]) -> Iterator[tuple[int, dict]]:
    """State of `datasets` after so many documents of the file, in one pass."""
    stream, taken = streamed(path), 0
    rows = iter(stream)
    for place in places:
        while taken < place:
            next(rows)
            taken += 1
        yield place, stream.state_dict()


def first_document(path: Path, state: dict) -> dict:
    stream = streamed(path)
    stream.load_state_dict(state)
    return next(iter(stream))


def streamed(path: Path):
    import datasets

    return datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
