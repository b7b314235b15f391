"""How fast is a training step, beside published models and a plain module of the same size?

    python benchmarks/train_step.py --peers-venv DIR [--shape 12x384x4x512 ...] [--only stablelm,litgpt]
        [--mode eager compiled] [--precision bf16] [--rounds 9] [--runs DIR] [--out FILE.json]

A step is forward, backward, clipping and AdamW on one device. In the first round every contestant, eager and compiled,
has a process of its own and an empty compile cache. The further rounds are of those that decide a ratio: at each shape
the quickest of stablelm and of the plain module, eager and compiled, the leanest of stablelm and of the peers, and the
two quickest peers. They take turns, a few steps each, in an order that changes from round to round; their processes
are replaced every --sitting rounds. As many go on as fit into --memory beside one another, the second quickest peer
last.

    tokens_per_second      of the median step of a round, after the warm-up
    peak_memory_bytes      most that the process held; training_memory_bytes: less what it held once all was imported
    first_step_seconds     from the start of the process to the end of the first step, imports and compilation included,
                           of the first round; import_seconds: the first part of it
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
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.out_path import out_path
from benchmarks.training.contestants import CONTESTANTS, OURS, is_peer
from benchmarks.training.live import REPOSITORY, Failed, Live, Unavailable, add_options, start
from benchmarks.training.shape import Shape
from stablelm.errors import ConfigError

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
        for shape in self.options.shape:
            for entry in entries:
                self._sit([entry], shape, range(1))
        for first in range(1, self.options.rounds, self.options.sitting):
            for shape in self.options.shape:
                rounds = range(first, min(first + self.options.sitting, self.options.rounds))
                go_on = finalists(read_rounds(self.folder), str(shape), entries, self.options.memory)
                self._sit(go_on, shape, rounds)

    def _sit(self, entries: list[str], shape: Shape, rounds: range) -> None:
        """Rounds of processes that live until all of them are done; nothing if all of them were done before."""
        if all(self._file(shape, entry, number).exists() for entry in entries for number in rounds):
            return
        with ExitStack() as stack:
            live = {entry: one for entry in entries if (one := self._start(entry, shape, rounds, stack))}
            for number in rounds:
                turn = number % max(1, len(live))
                for entry in [*live][turn:] + [*live][:turn]:
                    self._round(entry, live[entry], shape, number)

    def _start(self, entry: str, shape: Shape, rounds: range, stack: ExitStack) -> Live | None:
        if entry in self.left_out or f"{entry} {shape}" in self.failed:
            return None
        try:
            return stack.enter_context(self._process(entry, shape, cold=0 in rounds))
        except Unavailable as reason:
            self.left_out[entry] = str(reason)
            say(f"{entry} is left out: {reason} (of {self._python(entry)})")
        except Failed as reason:
            self._fail(entry, shape, reason)
        return None

    def _round(self, entry: str, live: Live, shape: Shape, number: int) -> None:
        if f"{entry} {shape}" in self.failed:
            return
        try:
            found = live.round()
        except Failed as reason:
            self._fail(entry, shape, reason)
            return
        self._file(shape, entry, number).write_text(json.dumps(found) + "\n")
        say(f"round {number + 1}  {shape}  {entry:<40}{found['tokens_per_second']:>10,.0f} tokens/s")

    def _fail(self, entry: str, shape: Shape, reason: Failed) -> None:
        self.failed[f"{entry} {shape}"] = str(reason)
        say(f"{entry} failed at {shape}: {reason}")

    def _file(self, shape: Shape, entry: str, number: int) -> Path:
        return self.folder / f"{shape}-{entry}-{number}.json"

    def _python(self, entry: str) -> str:
        venv = self.options.peers_venv if is_peer(entry) else None
        return str(venv.absolute() / "bin" / "python") if venv else sys.executable

    def _process(self, entry: str, shape: Shape, *, cold: bool) -> Live:
        name, _, mode = entry.rpartition("-")
        cache, python = self.folder.resolve() / "cache" / f"{shape}-{entry}", self._python(entry)
        return start(python, name, shape, self.options, cache, compiled=mode == "compiled", cold=cold)


def finalists(
    rounds: dict[tuple[str, str], dict[int, Round]], shape: str, entries: list[str], memory: float
) -> list[str]:
    """Of `entries`, those that decide a ratio at `shape`, by their first round, as long as `memory` bytes hold them."""
    first = {
        entry: found[0] for (at, entry), found in rounds.items() if at == shape and entry in entries and 0 in found
    }
    groups: dict[str, list[str]] = {}
    for entry in sorted(first, key=lambda entry: -first[entry]["tokens_per_second"]):
        group = "peers" if is_peer(entry) else f"{entry.partition('-')[0]} {entry.rpartition('-')[2]}"
        groups.setdefault(group, []).append(entry)
    wanted = [members[0] for members in groups.values()]
    peers, ours = groups.get("peers", []), [entry for entry in first if entry.startswith(OURS)]
    wanted += [min(some, key=lambda entry: first[entry]["peak_memory_bytes"]) for some in (peers, ours) if some]
    wanted += peers[1:2]
    chosen: set[str] = set()
    for entry in wanted:
        if sum(first[each]["peak_memory_bytes"] for each in chosen | {entry}) <= memory:
            chosen.add(entry)
    return [entry for entry in entries if entry in chosen]


def host_memory() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--memory", type=float, default=0.8 * host_memory(), metavar="BYTES", help="that those who take turns may hold"
    )
    parser.add_argument("--sitting", type=int, default=4, metavar="N", help="rounds that a process lives for")
    add_options(parser, steps=3)
    parser.add_argument("--peers-venv", type=Path, metavar="DIR", help="virtual environment of the peers")
    parser.add_argument("--runs", type=Path, default=Path("runs/train-step"), help="where finished rounds are kept")
    parser.add_argument("--out", type=out_path, metavar="FILE.json", help="write the records here")
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
