"""Runs rows of the covering array: trained, killed, resumed elsewhere, and equal to the run that was not disturbed.

`make combinations` runs all of them into runs/combinations (two to three hours on two cores); what is finished is kept,
so that it goes on where it was stopped. `--out FOLDER --rows 0:24 --again` runs some of them, or failed ones anew.
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
from combinations.rows import BATCH, ENGINES, KILLED_AT, STEPS, TASK, Sources
from support.choices import write_items
from support.forked import run_forked
from support.killed import kill_after_save
from support.pairwise import Case, pairs_of
from support.programs import environment, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus, make_tiny_corpus
from support.tokenizer_files import byte_level

from stablelm.checkpoint.best import BEST
from stablelm.checkpoint.selection import resolve_checkpoint
from stablelm.errors import EXIT_STOPPED_EARLY
from stablelm.observe.sinks import SAMPLES, last_records

TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}
LOSSES = ("loss", "val_loss/default")
CHOSEN = (f"task/{TASK}/acc", f"task/{TASK}/acc_norm", SAMPLES)
"""What comes of comparing logits: in bf16 another engine's rounding may decide otherwise."""
PATIENCE = 240.0  # seconds for one of a row's runs


class RowFailed(Exception):
    """A run of the row did not do what it should."""


def make_sources(folder: Path) -> Sources:
    """The same small corpus as files, shards, a data set and a mixture, with each tokenizer, and a task."""
    corpus = make_tiny_corpus(folder)
    (folder / "validation").mkdir()
    shutil.copy(corpus.validation, folder / "validation")
    tokenizers = {"sentencepiece": Path(corpus.tokenizer), "bpe-bytes": folder / "tokenizer.json"}
    tokenizers["bpe-bytes"].write_bytes(byte_level())
    texts = {}
    for kind, tokenizer in tokenizers.items():
        shards = folder / f"shards-{kind}"
        line = ["--source", corpus.train, "--tokenizer", str(tokenizer), "--out", str(shards)]
        script = str(REPOSITORY / "data" / "prepare.py")
        done = run_forked(script, line, environment(), processes=1, port=0, cwd=None, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        for source, form in _forms(corpus, shards).items():
            texts[source, kind] = (*form, f"data.tokenizer={tokenizer}")
    return Sources(texts, str(write_items(folder / "words.jsonl", count=7)))


def _forms(corpus: TinyCorpus, shards: Path) -> dict[str, tuple[str, ...]]:
    files = sorted((corpus.folder / "train").iterdir())
    mixture = f"{{web: {{path: [{files[0]}, {files[1]}], weight: 0.7}}, code: {{path: {files[2]}, weight: 0.3}}}}"
    validation = f"data.validation_path={corpus.validation}"
    folders = (f"data.path={corpus.folder / 'train'}", f"data.validation_path={corpus.folder / 'validation'}")
    return {
        "files": (f"data.path={corpus.train}", validation),
        "shards": ("data.source=shards", f"data.path={shards}", validation),
        "datasets": ("data.source=datasets", *folders),
        "mixture": (f"data.mixture={mixture}", validation),
    }


def run_row(case: Case, sources: Sources, folder: Path) -> float:
    """Trains, kills, resumes and compares; the largest relative difference of a figure. Raises RowFailed.

    `folder` must not exist and is removed when all is well.
    """
    start, resumed = str(case["engine"]), str(case["resume"])
    folder.mkdir(parents=True)
    first, later = (rows.arguments(case, start, sources, later=later) for later in (False, True))
    if first != later:  # a change needs a stop, also in the run that is not killed
        _whole([*first, f"run.stop_after={KILLED_AT}"], ENGINES[start][1], folder / "whole", code=EXIT_STOPPED_EARLY)
    _whole(later, ENGINES[start][1], folder / "whole", resumes=first != later)
    _killed(first, ENGINES[start][1], folder / "cut")
    _whole(rows.arguments(case, resumed, sources, later=True), ENGINES[resumed][1], folder / "cut", resumes=True)
    worst = _difference(folder / "whole", folder / "cut", case)
    allowed = 0.0 if start == resumed else TOLERANCE[str(case["precision"])]
    if not worst <= allowed:
        raise RowFailed(f"differs by {worst:.3g}, allowed {allowed:g}")
    shutil.rmtree(folder)
    return worst


def _whole(line: list[str], processes: int, run_dir: Path, *, resumes: bool = False, code: int = 0) -> None:
    done = run("pretrain", *line, f"run.dir={run_dir}", processes=processes, timeout=PATIENCE)
    found = summary(run_dir)["exit_code"] if (run_dir / "summary.json").exists() else done.returncode
    if {found, done.returncode} != {code}:
        raise RowFailed(f"exit code {found}: {' '.join((done.stderr or done.stdout).split())[-600:]}")
    if resumes and f"checkpoints/step-{KILLED_AT:08d}" not in done.stdout:
        raise RowFailed(f"did not resume from step {KILLED_AT}")


def _killed(line: list[str], processes: int, run_dir: Path) -> None:
    """The run, killed with all its processes as soon as its checkpoint is committed."""
    if words := kill_after_save(line, run_dir, KILLED_AT, processes=processes, patience=PATIENCE):
        raise RowFailed(f"was not killed after its save: {words}")


def _difference(whole: Path, cut: Path, case: Case) -> float:
    """The largest relative difference of a figure at any step; infinity if one is missing in one of the runs."""
    wanted, found = (last_records(path / "metrics.jsonl") for path in (whole, cut))
    worst = 0.0
    for step in range(1, STEPS + 1):
        for name in LOSSES:
            one, other = wanted.get(step, {}).get(name), found.get(step, {}).get(name)
            if (one is None) != (other is None):
                raise RowFailed(f"{name} of step {step} is {one} undisturbed and {other} after the kill")
            # A batch whose update was left out has no loss, in both runs alike.
            if one is not None and other is not None and not (one != one and other != other):
                worst = max(worst, abs(other / one - 1))
        exact = case["engine"] == case["resume"] or case["precision"] == "fp32"
        for name in CHOSEN if exact else ():
            one, other = wanted.get(step, {}).get(name), found.get(step, {}).get(name)
            if one != other:
                raise RowFailed(f"{name} of step {step} is {one} undisturbed and {other} after the kill")
    _recorded_as_asked(found, case)
    if case["best"] == "loss" and (best := _best(cut)) != _best(whole):
        raise RowFailed(f"the best checkpoint is {best} after the kill and {_best(whole)} undisturbed")
    return worst


def _best(run_dir: Path) -> str:
    return resolve_checkpoint(run_dir / BEST).name


def _recorded_as_asked(found: dict[int, dict[str, Any]], case: Case) -> None:
    saved, evaluated = found.get(KILLED_AT, {}), case["evaluate"] == "at the save"
    last = found.get(STEPS, {})
    for what, asked, recorded in (
        ("layers at the save", case["layers"] == "at the save", any(name.startswith("layer/") for name in saved)),
        ("evaluation at the save", evaluated, "val_loss/default" in saved),
        ("samples at the save", evaluated and case["samples"] == "yes", SAMPLES in saved),
        ("another rate at the end", case["rate"] == "changed", last["lr"] < 3e-4 * STEPS / 100 - 1e-9),
        ("tokens of a ramp", case["batch"] == "ramp", last["tokens"] < STEPS * BATCH * 32),
        ("samples at the end", case["samples"] == "yes", SAMPLES in last),
        ("tasks at the end", case["tasks"] == "choices", f"task/{TASK}/acc" in last),
    ):
        if asked != recorded:
            raise RowFailed(f"{what}: asked {asked}, recorded {recorded}")


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
