"""The runs that the probe quotes: what small models are at their start, and whether they then train.

    python benchmarks/trained.py run [--data GLOB --validation GLOB --tokenizer FILE.model] [--plan FILE] [--out FILE]
    python benchmarks/trained.py import --study FILE [--out FILE]

`run` trains every model of a plan, which is a list of {"method", "overrides", "n_layers", "lrs", "steps", "warmup"}, in
this process and with one thread: it appends one JSON object a run to the file, and a run that is there already is not
made again, so that it may be stopped and started at will. `import` adds the finished runs of a study, whose
starts are measured here.

A model trained if its validation loss ends LEARNED nats below that of a unigram model, which is what counting tokens
reaches without any layer.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.config.load import dump, load
from stablelm.config.schema import Config
from stablelm.data.storage.options import ReadOptions
from stablelm.data.validation import unigram_cross_entropy
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.launch_environment import AccelerateFlags, Launch
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.evaluate.perplexity import evaluate
from stablelm.json_text import as_number
from stablelm.probe.changes import FirstUpdate
from stablelm.probe.measure import measure
from stablelm.probe.run_records import RECORDS
from stablelm.probe.signals import Signals, signals_of
from stablelm.study.cells import Cell, Run, cells_of
from stablelm.study.results import Result, read_results
from stablelm.study.study_file import DEPTH, WARMUP, read_study
from stablelm.train.job import build_loader, first_rows, read_validation
from stablelm.train.prepare import Prepared, prepare
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

LEARNED = 0.1
SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
FIXED = {
    "model.d_model": 64,
    "model.n_heads": 2,
    "model.activation": "gelu",
    "model.attention.position": "rope",
    "data.seq_len": 32,
    "data.lanes": 48,
    "train.global_batch_size": 8,
    "train.schedule": "cosine",
    "train.grad_clip": 1.0,
    "evaluate.batches": 32,
    "evaluate.micro_batch_size": 32,
}
UNIGRAM_TOKENS = 2_000_000
PLAN = Path(__file__).with_name("trained_plan.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the models of a plan")
    running.add_argument("--data", default="embedded", help="training text, as data.path takes it")
    running.add_argument("--validation", help="held-out text; may be left out for the embedded corpus")
    running.add_argument("--tokenizer", default="embedded", help="SentencePiece .model file")
    running.add_argument("--plan", type=Path, default=PLAN)
    importing = commands.add_parser("import", help="take over the finished runs of a study")
    importing.add_argument("--study", required=True, help="its file, as launch/study.py takes it")
    for command in (running, importing):
        command.add_argument("--out", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        run_plan(arguments)
    else:
        import_study(arguments)


def run_plan(arguments: argparse.Namespace) -> None:
    """Makes the runs of the plan that the file lacks, in the plan's order."""
    text = {"data.path": arguments.data, "data.tokenizer": arguments.tokenizer}
    text |= {"data.validation_path": arguments.validation} if arguments.validation else {}
    for key, settings in planned(json.loads(arguments.plan.read_text())):
        if key in KnownRuns(arguments.out):
            continue
        try:
            given = [f"{name}={json.dumps(value)}" for name, value in {**FIXED, **text, **settings}.items()]
            append(arguments.out, key | one_run(load([], given).config))
        except ConfigError as error:
            print(f"{key['method']} {key['overrides'] or ''}: left out, {error}", file=sys.stderr, flush=True)


def planned(plan: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What identifies each run of a plan, and its settings."""
    for item in plan:
        overrides = item.get("overrides", {})
        for lr in item["lrs"]:
            key = {"method": item["method"], "overrides": overrides, "n_layers": item["n_layers"], "d_model": 64}
            key |= {"lr": lr, "warmup_steps": item["warmup"], "steps": item["steps"], "seed": item.get("seed", 0)}
            yield (
                key,
                {
                    "model.method": item["method"],
                    "model.n_layers": item["n_layers"],
                    "train.lr": lr,
                    "train.steps": item["steps"],
                    "train.warmup_steps": item["warmup"],
                    "run.seed": key["seed"],
                    **overrides,
                },
            )


KEYS = ("method", "overrides", "n_layers", "d_model", "lr", "warmup_steps", "steps", "seed")


class KnownRuns:
    """The runs that a file holds."""

    def __init__(self, path: Path):
        lines = path.read_text().splitlines() if path.exists() else []
        self._keys = [{name: row[name] for name in KEYS} for row in map(json.loads, lines)]

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return dict(key) in self._keys


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One line more, and one on the terminal."""
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
    words = f"{record['method']} {record['overrides'] or ''} {record['n_layers']} layers, lr {record['lr']:g}"
    print(f"{words}: {record['val_loss']} (unigram {record['unigram_loss']}), {record['outcome']}", flush=True)


def one_run(asked: Config) -> dict[str, Any]:
    """Signals at the start and what training makes of the model."""
    prepared = prepared_of(asked)
    started = time.perf_counter()
    signals = signals_at_start(prepared)
    engine = build_engine(prepared.config, "single", SINGLE)
    sets = read_validation(prepared)
    (data,) = sets.values()
    config, corpora = prepared.config, prepared.corpora
    assert corpora is not None
    losses = trained_losses(prepared, engine)
    val_loss = evaluate(engine, SINGLE, data, config.evaluate.micro_batch_size).loss
    unigram = unigram_cross_entropy(
        corpora.train,
        prepared.tokenizer,
        data,
        vocab=prepared.tokenizer.pieces,
        tokens=UNIGRAM_TOKENS,
        options=ReadOptions.of(config.data),
    )
    return outcome(signals, losses[0], sum(losses[-20:]) / len(losses[-20:]), val_loss, unigram) | {
        "text": text_name(config.data.path),
        "seconds": round(time.perf_counter() - started, 1),
    }


def outcome(signals: Signals, first: float, last: float, val_loss: float, unigram: float) -> dict[str, Any]:
    """The fields of a record that follow from signals and losses (nats a token; `last`: of the last 20 steps)."""
    return {
        "outcome": "trained" if val_loss < unigram - LEARNED else "failed",
        "first_loss": as_number(round(first, 4)),
        "last_loss": as_number(round(last, 4)),
        "val_loss": as_number(round(val_loss, 4)),
        "unigram_loss": as_number(round(unigram, 4)),
        "signals": {name: as_number(float(f"{value:.5g}")) for name, value in asdict(signals).items()},
        "commit": commit(),
    }


def trained_losses(prepared: Prepared, engine: Engine) -> list[float]:
    """The training loss of every step, on one process."""
    config, found = prepared.config, []
    assert config.train.steps is not None
    loader = build_loader(prepared, SINGLE)
    for step in range(1, config.train.steps + 1):
        batch = loader.next()
        result = train_step(
            engine,
            SINGLE,
            batch.tokens,
            batch.targets,
            step=step,
            lr=learning_rate(step, config.train),
            seed=config.run.seed,
            micro=len(batch.tokens),
        )
        found.append(float(result.cross_entropy / result.valid))
    loader.close()
    return found


def prepared_of(asked: Config) -> Prepared:
    """A checked configuration, whose run directory is never made."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(asked))
        loaded = load([str(file)], ["data.workers=0", f"run.dir={folder}/run"])
        return prepare(loaded, Launch(), AccelerateFlags(), "none")


def signals_at_start(prepared: Prepared) -> Signals:
    """On the first batch of the run."""
    config, seq_len = prepared.config, prepared.config.data.seq_len
    assert config.model.vocab_size is not None
    tokens, targets = first_rows(prepared, config.train.batch_sizes.first, seq_len)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(
            config.model,
            tokens,
            targets,
            precision="fp32",
            seed=config.run.seed,
            pieces=prepared.tokenizer.pieces,
            folder=Path(folder),
            update=FirstUpdate.of(config.model, config.train),
        )
    return signals_of(measured, vocab_size=config.model.vocab_size, seq_len=seq_len)


def import_study(arguments: argparse.Namespace) -> None:
    """The finished runs of a study, each with the signals of its model, rate and seed."""
    study = read_study(arguments.study)
    found = read_results(study.results_folder)
    for cell in cells_of(study):
        rows = [row for row in found.values() if Run(cell, row["lr"], row["seed"]).id == row["id"]]
        for row in sorted(rows, key=lambda row: (row["seed"], row["lr"])):
            key = key_of(cell, row)
            if key in KnownRuns(arguments.out):
                continue
            signals = signals_at_start(prepared_of(Run(cell, row["lr"], row["seed"]).config))
            # What is no finite number is None in a result.
            names = ("first_loss", "train_loss", "val_loss", "unigram_loss")
            losses = [math.nan if (loss := row[name]) is None else loss for name in names]
            text = {"text": text_name(cell.config.data.path)}
            append(arguments.out, key | outcome(signals, *losses) | text)


def key_of(cell: Cell, row: Result) -> dict[str, Any]:
    """What identifies a run of a study among the records."""
    own = ("model.method", DEPTH, WARMUP)
    key = {"method": cell.config.model.method, "n_layers": cell.shape.n_layers, "d_model": cell.shape.d_model}
    key |= {"overrides": {name: value for name, value in cell.point if name not in own}}
    key |= {"lr": row["lr"], "warmup_steps": cell.config.train.warmup_steps, "steps": row["steps"], "seed": row["seed"]}
    return key


def text_name(path: Any) -> str:
    """What the text is, without where it lies: `embedded`, or the first part of its files' names."""
    first = path[0] if isinstance(path, list) else str(path)
    return Path(first).name.split(".")[0].split("*")[0].strip("-")


def commit() -> str:
    """The revision of this code."""
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
