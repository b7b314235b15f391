"""What a save costs the training loop, and how saves and loads compare with the plainest ones.

    python benchmarks/checkpoints.py [--megabytes 500] [--rounds 5] [--directory DIR] [--out FILE.json]

Stall: how long a save in the background holds the loop up (the copy to host memory), over the time of the same save
done at once. Throughput: a bare `torch.save` to one file, which is then hashed, over a whole save of ours with hashes,
manifest, commit and everything forced to the disk; once as it is and once with an fsync, which ours always does. Load:
`torch.load` and a hash of the file, over ours with every file verified. Contestants take turns in one process, so that
a ratio compares neighbours in time; its CPU seconds are given too, which do not move when others use the cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from out_path import out_path

from stablelm.checkpoint import commit, fence, selection
from stablelm.checkpoint.background import Saver
from stablelm.checkpoint.format import load_tensors

OURS, PLAIN = "stablelm", "plain-torch-sha256"


def make_state(megabytes: float) -> dict[str, torch.Tensor]:
    """Weights and both moments of layers of 12 matrices of 512 x 512, a gain and a step each, in fp32."""
    draw, state, size, layer = torch.Generator().manual_seed(0), {}, 0, 0
    while size < megabytes * 1e6:
        shapes = {f"layers.{layer}.w{index}": (512, 512) for index in range(12)} | {f"layers.{layer}.gain": (512,)}
        for name, shape in shapes.items():
            parts = {f"model.{name}": shape, f"optim.{name}.exp_avg": shape, f"optim.{name}.exp_avg_sq": shape}
            for part, whole in {**parts, f"optim.{name}.step": ()}.items():
                state[part] = torch.randn(whole, generator=draw)
                size += state[part].nbytes
        layer += 1
    return state


class Bench:
    """One way of doing each thing, on the same state in the same directory."""

    def __init__(self, state: dict[str, torch.Tensor], directory: Path):
        self.state, self.file, self.root = state, directory / "plain.pt", directory / "checkpoints"
        self.mine = fence.take(self.root, "1")
        shapes = {name: tensor.shape for name, tensor in state.items()}
        self.shapes, self.saver = shapes, Saver(self.mine, None, shapes=shapes, background=True)
        self.saver.dry_run(state)
        self.step = 0
        self.target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def plain_save(self, sync: bool = False) -> None:
        with self.file.open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._hash()

    def save(self) -> None:
        self.step += 1
        commit.save(self.mine, self.step, self.state, {"step": self.step}, "", shapes=self.shapes, group=None)

    def stall(self) -> None:
        self.step += 1
        self.saver.save(self.step, self.state, {"step": self.step}, "", wait=False)

    def plain_load(self) -> None:
        torch.load(self.file, weights_only=True)
        self._hash()

    def load(self) -> None:
        load_tensors(selection.resolve_checkpoint(self.root) / "tensors", self.target, None)

    def clear(self) -> None:
        for path in selection.step_directories(self.root):
            shutil.rmtree(path)  # type: ignore[arg-type]

    def _hash(self) -> None:
        with self.file.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds (all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(bench: Bench, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every contestant in every round, in an order that turns round each time."""
    contestants: dict[str, Callable[[], None]] = {
        "plain save": bench.plain_save,
        "plain save, fsync": lambda: bench.plain_save(sync=True),
        "save": bench.save,
        "stall": bench.stall,
        "plain load": bench.plain_load,
        "load": bench.load,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    bench.plain_save()
    for round_ in range(rounds):
        for name in sorted(contestants, reverse=round_ % 2 == 1):
            if name == "load":
                bench.clear()
                bench.save()
            os.sync()
            seconds[name].append(timed(contestants[name]))
            bench.saver.wait()
            if "load" not in name:
                bench.clear()
    assert all(torch.equal(bench.target[name], tensor) for name, tensor in bench.state.items())
    return seconds


def summarise(seconds: dict[str, list[tuple[float, float]]], shape: str, size: int) -> list[dict[str, Any]]:
    """Ratios round by round, each so that the target can be read off it, and bytes a second."""
    pairs = {
        "stall_share": ("stall", "save", "of a synchronous save"),
        "save_throughput_ratio": ("plain save", "save", f"of {PLAIN}"),
        "save_throughput_ratio_fsync": ("plain save, fsync", "save", f"of {PLAIN}, forced to the disk too"),
        "load_throughput_ratio": ("plain load", "load", f"of {PLAIN}"),
    }
    records = []
    for metric, (above, below, unit) in pairs.items():
        for which, suffix in enumerate(("", "_cpu")):
            ratios = [a[which] / b[which] for a, b in zip(seconds[above], seconds[below], strict=True)]
            records.append(_record(OURS, shape, metric + suffix, ratios, unit))
    for name, values in seconds.items():
        who = PLAIN if name.startswith("plain") else OURS
        metric = name.removeprefix("plain ").replace(", ", "_") + "_bytes_per_second"
        records.append(_record(who, shape, metric, [size / wall for wall, _ in values], "bytes/s"))
    return records


def _record(name: str, shape: str, metric: str, values: list[float], unit: str) -> dict[str, Any]:
    spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {"name": name, "shape": shape, "metric": metric, **spread, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="a folder on the disk to measure; default: the system's temporary one")
    parser.add_argument("--out", type=out_path, help="write the records here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = make_state(options.megabytes)
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        seconds = measure(Bench(state, Path(folder)), options.rounds)
    records = summarise(seconds, f"{len(state)} tensors, {size / 1e6:.0f} MB", size)
    for record in records:
        numbers = f"{record['median']:>16,.3f} ({record['low']:,.3f} to {record['high']:,.3f})"
        print(f"{record['name']:<20} {record['metric']:<32} {numbers} {record['unit']}")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
