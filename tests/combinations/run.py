"""Runs rows of the covering array: trained, killed, resumed elsewhere, and equal to the run that was not disturbed.

`make combinations` runs all of them into runs/combinations (an hour or two on two cores); what is finished is kept, so
that it goes on where it was stopped. `--out FOLDER --rows 0:24 --again` runs some of them, or failed ones anew.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]

from combinations import rows
from combinations.rows import ENGINES, KILLED_AT, STEPS, Sources
from support.forked import run_forked, start_ranks
from support.pairwise import Case, pairs_of
from support.programs import LAUNCH, environment, free_port, run, summary
from support.samples import REPOSITORY
from support.tiny import make_tiny_corpus

from stablelm.observe.sinks import last_records

TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}
FIGURES = ("loss", "val_loss/default")
SLOW = ("faults.allow=true", "faults.slow=[0,0.4]")  # so that a kill comes before the run is over
PATIENCE = 240.0  # seconds for one of a row's runs


class RowFailed(Exception):
    """A run of the row did not do what it should."""


def make_sources(folder: Path) -> Sources:
    """The same small corpus as files, shards, a data set and a mixture."""
    corpus = make_tiny_corpus(folder)
    files = sorted((folder / "train").iterdir())
    line = ["--source", corpus.train, "--tokenizer", corpus.tokenizer, "--out", str(folder / "shards")]
    done = run_forked(
        str(REPOSITORY / "data" / "prepare.py"), line, environment(), processes=1, port=0, cwd=None, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    mixture = f"{{web: {{path: [{files[0]}, {files[1]}], weight: 0.7}}, code: {{path: {files[2]}, weight: 0.3}}}}"
    (folder / "validation").mkdir()
    shutil.copy(corpus.validation, folder / "validation")
    validation = f"data.validation_path={corpus.validation}"
    forms = {
        "files": (f"data.path={corpus.train}", validation),
        "shards": ("data.source=shards", f"data.path={folder / 'shards'}", validation),
        "datasets": (
            "data.source=datasets",
            f"data.path={folder / 'train'}",
            f"data.validation_path={folder / 'validation'}",
        ),
        "mixture": (f"data.mixture={mixture}", validation),
    }
    return Sources(forms, (f"data.tokenizer={corpus.tokenizer}",))


def run_row(case: Case, sources: Sources, folder: Path) -> float:
    """Trains, kills, resumes and compares; the largest relative difference of a figure. Raises RowFailed.

    `folder` must not exist and is removed when all is well.
    """
    start, resumed = str(case["engine"]), str(case["resume"])
    folder.mkdir(parents=True)
    _whole(rows.arguments(case, start, sources), ENGINES[start][1], folder / "whole")
    _killed(rows.arguments(case, start, sources), ENGINES[start][1], folder / "cut")
    _whole(rows.arguments(case, resumed, sources), ENGINES[resumed][1], folder / "cut", resumes=True)
    worst = _difference(folder / "whole", folder / "cut", case)
    allowed = 0.0 if start == resumed else TOLERANCE[str(case["precision"])]
    if not worst <= allowed:
        raise RowFailed(f"differs by {worst:.3g}, allowed {allowed:g}")
    shutil.rmtree(folder)
    return worst


def _whole(line: list[str], processes: int, run_dir: Path, *, resumes: bool = False) -> None:
    done = run("pretrain", *line, f"run.dir={run_dir}", processes=processes, timeout=PATIENCE)
    code = summary(run_dir)["exit_code"] if (run_dir / "summary.json").exists() else done.returncode
    if code or done.returncode:
        raise RowFailed(f"exit code {code}: {' '.join((done.stderr or done.stdout).split())[-600:]}")
    if resumes and f"checkpoints/step-{KILLED_AT:08d}" not in done.stdout:
        raise RowFailed(f"did not resume from step {KILLED_AT}")


def _killed(line: list[str], processes: int, run_dir: Path) -> None:
    """The run, killed with all its processes as soon as its checkpoint is committed."""
    output = run_dir.with_name("output")
    output.mkdir()
    script, arguments = str(LAUNCH / "pretrain.py"), [*line, *SLOW, f"run.dir={run_dir}"]
    ranks = start_ranks(script, arguments, environment(), processes=processes, port=free_port(), output=output)
    committed = run_dir / "checkpoints" / f"step-{KILLED_AT:08d}" / "COMMITTED"
    deadline = time.monotonic() + PATIENCE
    try:
        while not committed.exists() and time.monotonic() < deadline and any(r.exitcode is None for r in ranks):
            time.sleep(0.01)
        alive = all(rank.exitcode is None for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if not (committed.exists() and alive):
        words = " ".join((output / "err").read_text().split())
        raise RowFailed(f"was not killed after its save: {words[-600:] or 'it was over, or took too long'}")


def _difference(whole: Path, cut: Path, case: Case) -> float:
    """The largest relative difference of a figure at any step; infinity if one is missing in one of the runs."""
    wanted, found = (last_records(path / "metrics.jsonl") for path in (whole, cut))
    worst = 0.0
    for step in range(1, STEPS + 1):
        for name in FIGURES:
            one, other = wanted.get(step, {}).get(name), found.get(step, {}).get(name)
            if (one is None) != (other is None):
                raise RowFailed(f"{name} of step {step} is {one} undisturbed and {other} after the kill")
            # A batch whose update was left out has no loss, in both runs alike.
            if one is not None and other is not None and not (one != one and other != other):
                worst = max(worst, abs(other / one - 1))
    layers = [name for name in found.get(KILLED_AT, {}) if name.startswith("layer/")]
    evaluated = "val_loss/default" in found.get(KILLED_AT, {})
    asked = (case["layers"] == "at the save", case["evaluate"] == "at the save")
    if (bool(layers), evaluated) != asked:
        raise RowFailed(f"layers and evaluation at the save: asked {asked}, recorded {(bool(layers), evaluated)}")
    return worst


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/combinations"))
    parser.add_argument("--rows", default=":", metavar="FIRST:LAST", help="part of the rows, as in a slice")
    parser.add_argument("--again", action="store_true", help="run rows anew that failed before")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    first, last = (int(part) if part else None for part in options.rows.split(":"))
    done = read(options.out / "results.jsonl")
    if options.again:
        done = {name: result for name, result in done.items() if not result["problem"]}
    shutil.rmtree(options.out / "corpus", ignore_errors=True)
    sources = make_sources(options.out / "corpus")
    for index, case in list(enumerate(rows.in_order()))[first:last]:
        if rows.named(case) in done:
            continue
        result = attempt(case, sources, options.out / f"row-{index}")
        done[result["row"]] = result
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{index:>3}  {result['seconds']:>6.1f} s  {result['problem'] or 'equal'}  {result['row']}", flush=True)
    print(table(done))
    return 1 if any(result["problem"] for result in done.values()) else 0


def attempt(case: Case, sources: Sources, folder: Path) -> dict[str, Any]:
    """A row's result as it is kept: its name, what went wrong ('' if nothing), the largest difference, seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    started, worst, problem = time.monotonic(), None, ""
    try:
        worst = run_row(case, sources, folder)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return {"row": rows.named(case), "problem": problem, "worst": worst, "seconds": time.monotonic() - started}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each row, by its name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["row"]: result for result in map(json.loads, lines)}


def table(done: dict[str, dict[str, Any]]) -> str:
    """Rows and pairs covered so far."""
    cover = rows.array()
    equal = [case for case in cover.cases if (found := done.get(rows.named(case))) and not found["problem"]]
    pairs = {pair for case in equal for pair in pairs_of(case)} & cover.possible
    kinds = Counter("same engine" if case["engine"] == case["resume"] else case["precision"] for case in equal)
    worst = {
        kind: max((done[rows.named(c)]["worst"] for c in equal if c["precision"] == kind), default=0.0)
        for kind in TOLERANCE
    }
    return "\n".join(
        [
            f"rows     {len(equal)} equal of {len(cover.cases)}, {len(done)} run, "
            f"{sum(bool(result['problem']) for result in done.values())} with a problem",
            f"pairs    {len(pairs)} of {len(cover.possible)} in runs; {len(cover.impossible)} refused with a reason",
            f"compared {kinds['same engine']} bit for bit on the same engine, {kinds['fp32']} in fp32 (worst "
            f"{worst['fp32']:.1e}), {kinds['bf16']} in bf16 (worst {worst['bf16']:.1e}) on another",
            f"time     {sum(result['seconds'] for result in done.values()) / 60:.0f} min",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
