"""Peak memory and time of an export, for a checkpoint of any size.

    python benchmarks/export.py [--config configs/runs/c4-1.3b-192.yaml ...] [--shard-gb 0.5] [--out FILE.json]

Writes a checkpoint of the configuration's model with random weights, tensor by tensor, and exports it as a program of
its own, whose anonymous memory is read from Linux's /proc every 10 ms. `limit` is what an export may take: two shards
and 1 GB. Needs 6 bytes a parameter of disk for a bf16 export.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from out_path import out_path

from stablelm.checkpoint import commit
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.config import rules
from stablelm.config.identity import identity
from stablelm.config.load import dump, load
from stablelm.config.schema import Config
from stablelm.data.embedded import embedded
from stablelm.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STANDARD = ["model.norm=rmsnorm", "model.activation=swiglu", "model.attention.position=rope", "model.vocab_size=null"]


def write_run(folder: Path, config: Config) -> int:
    """A run directory with a checkpoint of random weights; returns the number of parameters."""
    tokenizer = load_tokenizer(embedded(config.data.cache).tokenizer)
    config = replace(config, data=replace(config.data, path="embedded", tokenizer=tokenizer.path))
    config = rules.resolve(
        config, pieces=tokenizer.pieces, eos=tokenizer.eos, world_size=1, accelerate_precision=None
    )  # fmt: skip
    shapes = expected_shapes(config.model, optimizer=False)
    draw = torch.Generator().manual_seed(0)
    state = {
        "step": 0,
        "tokens": 0,
        "data": {"data_step": 0, "lanes": {}},
        "identity": identity(config, base_names=[], tokenizer_sha256=tokenizer.sha256),
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def drawn(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=draw).mul_(config.model.d_model**-0.5)

    fence = Fence(folder / "checkpoints", 0, "benchmark")
    commit.save(fence, 0, tensors, state, dump(config), shapes=shapes, group=None, read=drawn)
    (folder / "config.yaml").write_text(dump(config))
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return sum(shape.numel() for shape in shapes.values())


def measure(run: Path, out: Path, shard_gb: float) -> tuple[int, float]:
    """Peak anonymous bytes and seconds of an export."""
    command = [sys.executable, str(ROOT / "launch" / "export.py"), "--checkpoint", str(run), "--out", str(out)]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--format", "llama", "--shard-gb", str(shard_gb)])
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)
    return peak, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="default: configs/runs/c4-1.3b-192.yaml")
    parser.add_argument("--shard-gb", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--directory", help="a folder on the disk to write to; default: the system's temporary one")
    parser.add_argument("--out", type=out_path, help="write the records here as JSON")
    options = parser.parse_args()
    config = load(options.config or [str(ROOT / "configs/runs/c4-1.3b-192.yaml")], STANDARD).config
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        parameters = write_run(Path(folder) / "run", config)
        peak, seconds = measure(Path(folder) / "run", Path(folder) / "out", options.shard_gb)
    limit = 2e9 * options.shard_gb + 1e9
    shape = (
        f"{config.model.n_layers}x{config.model.d_model}, {parameters / 1e9:.2f} B, shards of {options.shard_gb:g} GB"
    )
    records = [
        {"name": name, "shape": shape, "metric": metric, "median": value, "low": value, "high": value, "unit": unit}
        for name, metric, value, unit in (
            ("stablelm", "peak_memory_bytes", peak, "bytes"),
            ("limit", "peak_memory_bytes", limit, "bytes"),
            ("stablelm", "export_seconds", seconds, "s"),
        )
    ]
    for record in records:
        print(f"{record['name']:<10} {record['metric']:<20} {record['median']:>18,.1f} {record['unit']}  {shape}")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
