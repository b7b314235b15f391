"""How fast is a training step, beside published models and a plain module of the same size?

    python benchmarks/train_step.py --peers-venv DIR [--shape 12x384x4x512 ...] [--only stablelm,litgpt]
        [--mode eager compiled] [--precision bf16] [--rounds 9] [--runs DIR] [--out FILE.json]

A step is forward, backward, clipping and AdamW on one device. In each round every contestant, eager and compiled, has a
fresh process, in an order that changes from round to round; the first --cold-rounds have an empty compile cache:

    tokens_per_second      of the median step after the warm-up
    peak_memory_bytes      most that the process held; training_memory_bytes: less what it held once all was imported
    first_step_seconds     from the start of the process to the end of the first step, imports and compilation included,
                           of rounds with an empty cache; import_seconds: the first part of it
    flops_share            FLOPs (6 x matmul parameters, head but no embedding, plus causal attention) a second, of the
                           most that bf16 matmuls of 4096 x 4096 reached in the same round

Finished rounds are kept in --runs: the same command continues where it was stopped. Peers need a virtual environment
of their own, since they pin other versions: python -m venv DIR; DIR/bin/pip install 'torch~=2.13.0' litgpt
x-transformers 'transformers>=5.2,<6' (in one command: an open range of torch may bring another torch).
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training.contestants import CONTESTANTS, is_peer
from benchmarks.training.one_round import UNAVAILABLE
from benchmarks.training.shape import Shape
from stablelm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = ("12x384x4x512", "24x512x2x512", "96x128x2x512", "192x256x1x256")
MODES = ("eager", "compiled")
UNITS = {
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "bytes",
    "training_memory_bytes": "bytes",
    "first_step_seconds": "s",
    "import_seconds": "s",
    "flops_share": "of the matmul peak",
    "parameters": "parameters",
}
Round = dict[str, Any]


class Benchmark:
    """Rounds of the contestants that were asked for; what has run is in `folder`. Raises ConfigError."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.names = options, chosen(options.only)
        self.folder = claim(options)
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        entries = [f"{name}-{mode}" for name in self.names for mode in self.options.mode]
        for number in range(self.options.rounds):
            for shape in self.options.shape:
                turn = number % len(entries)
                for entry in (*entries[turn:], *entries[:turn]):
                    self._one(entry, shape, number)

    def _one(self, entry: str, shape: Shape, number: int) -> None:
        file = self.folder / f"{shape}-{entry}-{number}.json"
        if file.exists() or entry in self.left_out or f"{entry} {shape}" in self.failed:
            return
        done = self._process(entry, shape, cold=number < self.options.cold_rounds)
        last = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if done.returncode == 0:
            file.write_text(last + "\n")
            found = json.loads(last)
            say(f"round {number + 1}  {shape}  {entry:<40}{found['tokens_per_second']:>10,.0f} tokens/s")
        elif done.returncode == UNAVAILABLE:
            self.left_out[entry] = json.loads(last)["unavailable"]
            say(f"{entry} is left out: {self.left_out[entry]} (of {self._python(entry)})")
        else:
            self.failed[f"{entry} {shape}"] = last
            say(f"{entry} failed at {shape}: {(done.stderr.strip() or last).splitlines()[-1]}")

    def _python(self, entry: str) -> str:
        venv = self.options.peers_venv if is_peer(entry) else None
        return str(venv / "bin" / "python") if venv else sys.executable

    def _process(self, entry: str, shape: Shape, *, cold: bool) -> subprocess.CompletedProcess[str]:
        name, _, mode = entry.rpartition("-")
        options, cache = self.options, self.folder.resolve() / "cache" / f"{shape}-{entry}"
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        settings = {
            "shape": str(shape),
            "vocab_size": options.vocab,
            "precision": options.precision,
            "cold": cold,
            "compiled": mode == "compiled",
            "device": options.device,
            "warm_up": options.warm_up,
            "steps": options.steps,
            "started": time.monotonic(),
        }
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        command = [self._python(entry), "-m", "benchmarks.training.one_round", name, json.dumps(settings)]
        try:
            return subprocess.run(
                command,
                env=environment,
                cwd=cache,
                capture_output=True,
                text=True,
                timeout=options.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"no result within {options.timeout:g} s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen(only: str | None) -> list[str]:
    """The contestants whose names begin with one of the words; ConfigError for a word that fits none."""
    words = only.split(",") if only else [""]
    for word in words:
        if not any(name.startswith(word) for name in CONTESTANTS):
            raise ConfigError(f"--only {word} fits no contestant; they are {', '.join(CONTESTANTS)}")
    return [name for name in CONTESTANTS if name.startswith(tuple(words))]


def claim(options: argparse.Namespace) -> Path:
    """The folder of rounds; ConfigError if those in it are of other settings or of other code."""
    code = hashlib.sha256()
    for file in sorted((*(REPOSITORY / "stablelm").rglob("*.py"), *(REPOSITORY / "benchmarks/training").glob("*.py"))):
        code.update(file.read_bytes())
    keys = ("precision", "vocab", "warm_up", "steps", "threads", "device")
    settings = {key: getattr(options, key) for key in keys} | {"code": code.hexdigest()}
    folder: Path = options.runs
    if (folder / "settings.json").exists():
        kept = json.loads((folder / "settings.json").read_text())
        if other := [key for key in settings if kept.get(key) != settings[key]]:
            raise ConfigError(f"--runs {folder} holds rounds of other {', '.join(other)}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings) + "\n")
    return folder


def read_rounds(folder: Path) -> dict[tuple[str, str], dict[int, Round]]:
    """By shape and entry, then by round."""
    found: dict[tuple[str, str], dict[int, Round]] = {}
    for file in folder.glob("*x*x*x*-*.json"):
        shape, _, rest = file.stem.partition("-")
        entry, _, number = rest.rpartition("-")
        found.setdefault((shape, entry), {})[int(number)] = json.loads(file.read_text())
    peaks: dict[tuple[str, int], float] = {}
    for (shape, _), rounds in found.items():
        for number, each in rounds.items():
            peaks[shape, number] = max(peaks.get((shape, number), 0.0), each["matmul_flops_per_second"])
    for (shape, _), rounds in found.items():
        for number, each in rounds.items():
            each["flops_share"] = each["flops_per_second"] / peaks[shape, number]
            each["training_memory_bytes"] = each["peak_memory_bytes"] - each["import_memory_bytes"]
    return found


def records(rounds: dict[tuple[str, str], dict[int, Round]]) -> list[dict[str, Any]]:
    """Medians with quartiles, in the order of shapes and CONTESTANTS."""
    order = [f"{name}-{mode}" for name in CONTESTANTS for mode in MODES]
    made = []
    for shape, entry in sorted(rounds, key=lambda key: (key[0], order.index(key[1]))):
        for metric, unit in UNITS.items():
            values = [each[metric] for each in rounds[shape, entry].values() if metric in each]
            if not values:
                continue
            low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            spread = {"median": median, "low": low, "high": high}
            made.append({"name": entry, "shape": shape, "metric": metric, **spread, "unit": unit})
    return made


def show(made: list[dict[str, Any]]) -> None:
    """A line a contestant and shape: medians."""
    print(f"{'':58}{'tokens/s':>10}{'peak GB':>9}{'training':>9}{'first s':>9}{'share':>7}{'parameters':>13}")
    for shape, entry in dict.fromkeys((each["shape"], each["name"]) for each in made):
        of = {each["metric"]: each["median"] for each in made if (each["shape"], each["name"]) == (shape, entry)}
        print(
            f"{shape:16}{entry:42}{of['tokens_per_second']:>10,.0f}{of['peak_memory_bytes'] / 1e9:>9.2f}"
            f"{of['training_memory_bytes'] / 1e9:>9.2f}{of['first_step_seconds']:>9.1f}{of['flops_share']:>7.2f}"
            f"{of['parameters']:>13,.0f}"
        )


def shape_of(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not layers x width x batch x sequence with a width that 64 divides, as in {SHAPES[0]}"
        ) from None


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", type=shape_of, default=[shape_of(each) for each in SHAPES])
    parser.add_argument("--only", metavar="NAME,NAME", help=f"beginnings of names: {', '.join(CONTESTANTS)}")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cold-rounds", type=int, default=3, metavar="N", help="rounds that begin without compiled code"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="steps after the first that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one process may take")
    parser.add_argument("--peers-venv", type=Path, metavar="DIR", help="virtual environment of the peers")
    parser.add_argument("--runs", type=Path, default=Path("runs/train-step"), help="where finished rounds are kept")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the records here")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        if options.peers_venv and not (options.peers_venv / "bin" / "python").exists():
            raise ConfigError(f"--peers-venv {options.peers_venv} has no bin/python; make it with python -m venv")
        benchmark = Benchmark(options)
        benchmark.run()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    made = records(read_rounds(options.runs))
    show(made)
    if options.out:
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
