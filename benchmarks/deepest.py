"""How much memory the deepest models take: runs of a few steps by `stablelm pretrain`, and the most that each held.

    python benchmarks/deepest.py [--steps 2] [--out FILE.json]

Width 256, one sequence of 512 tokens, fp32, a step with everything a run does; `engine.recompute=auto` fits it into
`engine.memory_limit`. Writes text, tokenizer and a checkpoint of up to 14 GB to a temporary folder. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.out_path import out_path

GOAL_BYTES = 16e9
# Of tensors: the interpreter and its libraries take the rest.
LIMIT_BYTES = 15.2e9
COMMON = {
    "model.method": "pre_ln",
    "model.d_model": 256,
    "model.n_heads": 4,
    "data.path": "embedded",
    "data.tokenizer": "embedded",
    "data.seq_len": 512,
    "train.global_batch_size": 1,
    "train.lr": 1e-3,
    "engine.kind": "single",
    "engine.recompute": "auto",
    "engine.memory_limit": LIMIT_BYTES,
    "checkpoint.async": "false",  # a copy for a background save would need as much again
}
CASES = {
    "1,100 layers, clipping": {"model.n_layers": 1100, "train.grad_clip": 1.0},
    "1,450 layers, updates in the backward pass": {
        "model.n_layers": 1450,
        "train.grad_clip": 0,
        "engine.optimizer_in_backward": "true",
    },
}
EVERY = 0.1  # seconds between looks at the process


def peak_of_run(settings: dict[str, Any], folder: Path, steps: int) -> int:
    """Resident bytes; RuntimeError with the end of the run's output if it failed."""
    keys = {**COMMON, **settings, "train.steps": steps, "run.dir": str(folder / "run")}
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "stablelm", "pretrain", *(f"{key}={value}" for key, value in keys.items())],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _most_held(process.pid))
            time.sleep(EVERY)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {output.read_text()[-2000:]}")
    return peak


def _most_held(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=out_path, metavar="FILE.json", help="write the records here")
    options = parser.parse_args(arguments)
    records = []
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            peak = peak_of_run(settings, Path(folder), options.steps)
        print(f"{name:45}{peak / 1e9:8.2f} GB", flush=True)
        spread = {"median": peak, "low": peak, "high": peak}
        records.append({"name": name, "shape": "256x1x512", "metric": "peak_memory_bytes", **spread, "unit": "bytes"})
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
