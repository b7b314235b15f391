"""All that speed and memory are measured by, in one command: runs the benchmarks and prints a table of their ratios.

    python benchmarks/goals.py --peers-venv DIR --data DIR_OF_JSON_GZ --tokenizer FILE [--only NAME,NAME] [--rounds 9]
        [--runs runs/goals]

Runs train_step.py, methods.py, loader.py, checkpoints.py and deepest.py, one at a time (hours; use nothing else
meanwhile), and keeps what they write in --runs: the same command continues where it was stopped, and with everything
there it only prints. Ratios are of one round each, given as median and quartiles; against a group they are against its
best member by median. Writes goals.md and goals.json there too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deepest import GOAL_BYTES
from benchmarks.train_step import SHAPES, Round, read_rounds
from benchmarks.training.contestants import LEAN, OURS, PLAIN, is_peer

BENCHMARKS = Path(__file__).resolve().parent
METHOD_SHAPES = ("24x512x2x512", "192x256x1x256")
METHOD_GOALS = {"sigma_reparam": 1.12, "magneto": 1.08, "deepscalelm_pre": 1.02, "catformer": 1.20}
Rounds = dict[tuple[str, str], dict[int, Round]]
Records = list[dict[str, Any]]


class Reached(NamedTuple):
    """A row of the table: a ratio with quartiles and what was wanted, `at_least` or at most."""

    what: str
    shape: str
    median: float
    low: float
    high: float
    goal: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.median >= self.goal if self.at_least else self.median <= self.goal


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return median, low, high


def best(rounds: Rounds, shape: str, entries: list[str], metric: str, *, most: bool) -> str | None:
    """The entry with the best median of those with the most rounds, None if none of them has run."""
    found = {
        entry: values
        for entry in entries
        if (values := [each[metric] for each in rounds.get((shape, entry), {}).values() if metric in each])
    }
    most_rounds = max(map(len, found.values()), default=0)
    medians = {entry: statistics.median(values) for entry, values in found.items() if len(values) == most_rounds}
    return (max if most else min)(medians, key=lambda entry: medians[entry]) if medians else None


def ratio_row(
    rounds: Rounds, what: str, shape: str, ours: list[str], theirs: list[str], metric: str, goal: float, *, most: bool
) -> list[Reached]:
    """Our best of theirs, round by round; nothing where a side has not run."""
    mine, other = (best(rounds, shape, entries, metric, most=most) for entries in (ours, theirs))
    if mine is None or other is None:
        return []
    a, b = rounds[shape, mine], rounds[shape, other]
    values = [a[n][metric] / b[n][metric] for n in a.keys() & b.keys() if metric in a[n] and metric in b[n]]
    return [Reached(f"{what}: {mine} / {other}", shape, *spread(values), goal, most)] if values else []


def training_rows(rounds: Rounds) -> list[Reached]:
    entries = sorted({entry for _, entry in rounds})
    peers = [entry for entry in entries if is_peer(entry)]
    rows: list[Reached] = []
    for shape in SHAPES:
        for mode, of_plain in (("compiled", 1.10), ("eager", 1.15)):
            ours = [entry for entry in entries if entry.startswith(OURS) and entry.endswith(mode)]
            plain = [entry for entry in entries if entry.startswith(PLAIN) and entry.endswith(mode)]
            if mode == "compiled":
                # A peer that is quicker as it is counts as it is.
                rows += ratio_row(rounds, "tokens/s", shape, ours, peers, "tokens_per_second", 1.25, most=True)
            rows += ratio_row(rounds, "tokens/s", shape, ours, plain, "tokens_per_second", of_plain, most=True)
        ours = [entry for entry in entries if entry.startswith(OURS)]
        rows += ratio_row(rounds, "peak memory", shape, ours, peers, "peak_memory_bytes", 0.80, most=False)
        whole = [entry for entry in ours if LEAN not in entry]
        what = "peak memory without recompute"
        rows += ratio_row(rounds, what, shape, whole, peers, "peak_memory_bytes", 0.80, most=False)
    compiled = [entry for entry in entries if entry.endswith("compiled")]
    ours, peers = ([e for e in compiled if e.startswith(OURS)], [e for e in compiled if is_peer(e)])
    for shape in SHAPES[2:]:
        rows += ratio_row(rounds, "start to first step", shape, ours, peers, "first_step_seconds", 0.10, most=False)
    return [*rows, *_growth(rounds, ours), *_share(rounds, ours)]


def _growth(rounds: Rounds, ours: list[str]) -> list[Reached]:
    """Seconds to the first step at the deepest shape, of those at the shallowest."""
    shallow, deep = SHAPES[0], SHAPES[-1]
    entry = best(rounds, deep, ours, "first_step_seconds", most=False)
    if entry is None or (shallow, entry) not in rounds:
        return []
    a, b = rounds[deep, entry], rounds[shallow, entry]
    values = [a[n]["first_step_seconds"] / b[n]["first_step_seconds"] for n in a.keys() & b.keys() if _cold(a, b, n)]
    return [Reached(f"first step, deepest / shallowest: {entry}", deep, *spread(values), 1.5, False)] if values else []


def _cold(a: dict[int, Round], b: dict[int, Round], number: int) -> bool:
    return "first_step_seconds" in a[number] and "first_step_seconds" in b[number]


def _share(rounds: Rounds, ours: list[str]) -> list[Reached]:
    entry = best(rounds, SHAPES[1], ours, "flops_share", most=True)
    if entry is None:
        return []
    values = [each["flops_share"] for each in rounds[SHAPES[1], entry].values()]
    return [Reached(f"share of the matmul peak: {entry}", SHAPES[1], *spread(values), 0.55, True)]


def method_rows(records: Records) -> list[Reached]:
    return [
        Reached(f"step: {each['name']} / pre_ln", each["shape"], *_spread_of(each), METHOD_GOALS[method], False)
        for each in records
        if each["metric"] == "step_time_ratio" and (method := each["name"].partition(" ")[0]) in METHOD_GOALS
    ]


def loader_rows(records: Records, cores: str) -> list[Reached]:
    """Our quickest form of `datasets`'s quickest, by medians: the rounds of loader.py are not kept one by one."""
    rates = {each["name"]: each for each in records if each["metric"] == "wall_rate"}
    ours = max((name for name in rates if name.startswith("loader")), key=lambda name: rates[name]["median"])
    theirs = max((name for name in rates if name.startswith("datasets")), key=lambda name: rates[name]["median"])
    base = rates[theirs]["median"]
    low, median, high = (rates[ours][key] / base for key in ("low", "median", "high"))
    return [Reached(f"streaming, {cores}: {ours} / {theirs}", rates[ours]["shape"], median, low, high, 1.05, True)]


def checkpoint_rows(records: Records) -> list[Reached]:
    return [
        Reached("stall of a save in the background / one at once", each["shape"], *_spread_of(each), 0.10, False)
        for each in records
        if each["metric"] == "stall_share"
    ]


def depth_rows(records: Records) -> list[Reached]:
    rows = []
    for each in records:
        share = each["median"] / GOAL_BYTES
        rows.append(Reached(f"peak memory of {each['name']}, of 16 GB", each["shape"], share, share, share, 1.0, False))
    return rows


def _spread_of(record: dict[str, Any]) -> tuple[float, float, float]:
    return record["median"], record["low"], record["high"]


def table(rows: list[Reached]) -> str:
    """Markdown."""
    lines = ["| what | shape | reached | quartiles | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        goal = f"{'≥' if row.at_least else '≤'} {row.goal:.2f}"
        span = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(
            f"| {row.what} | {row.shape} | {row.median:.2f} | {span} | {goal} | {'yes' if row.met else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def rows_of(folder: Path) -> list[Reached]:
    """Of what has been measured so far."""

    def read(name: str) -> Records:
        file = folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else []

    rows = training_rows(read_rounds(folder / "train-step"))
    rows += method_rows(read("methods-eager") + read("methods-compiled"))
    for name, cores in (("loader-one-core", "one core"), ("loader-two-cores", "two cores")):
        rows += loader_rows(found, cores) if (found := read(name)) else []
    return rows + checkpoint_rows(read("checkpoints")) + depth_rows(read("deepest"))


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """By the name of what each writes."""
    rounds, runs = [f"--rounds={options.rounds}"], options.runs
    peers = [f"--peers-venv={options.peers_venv}"] if options.peers_venv else []
    peers += [f"--only={options.only}"] if options.only else []
    methods = ["methods.py", *rounds, "--precision=bf16", "--shape", *METHOD_SHAPES]
    found = {
        "train-step": ["train_step.py", *rounds, *peers, f"--runs={runs}/train-step"],
        "methods-eager": methods,
        "methods-compiled": [*methods, "--compile"],
        "checkpoints": ["checkpoints.py", *rounds],
        "deepest": ["deepest.py"],
    }
    if options.data and options.tokenizer:
        loader = ["loader.py", *rounds, f"--data={options.data}", f"--tokenizer={options.tokenizer}"]
        found |= {"loader-one-core": loader, "loader-two-cores": [*loader, "--two-cores"]}
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-venv", type=Path, metavar="DIR", help="as train_step.py takes it")
    parser.add_argument("--only", metavar="NAME,NAME", help="as train_step.py takes it")
    parser.add_argument("--data", type=Path, metavar="DIR", help="as loader.py takes it; without it no streaming")
    parser.add_argument("--tokenizer", metavar="FILE", help="as loader.py takes it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=Path, default=Path("runs/goals"), help="where all results are kept")
    parser.add_argument("--table-only", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (script, *rest) in {} if options.table_only else commands(options).items():
        out = options.runs / f"{name}.json"
        if out.exists():
            continue
        command = [sys.executable, str(BENCHMARKS / script), *rest, f"--out={out}"]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            failed.append(script)
    rows = rows_of(options.runs)
    (options.runs / "goals.json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    (options.runs / "goals.md").write_text(table(rows))
    print(table(rows), end="")
    for script in failed:
        print(f"{script} failed; its rows lack what it did not measure", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
