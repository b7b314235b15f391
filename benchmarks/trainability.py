"""Which methods train a very deep, narrow model, at which learning rates, and how much does the rate matter?

    python benchmarks/trainability.py --runs DIR --out DIR [--data GLOB --validation GLOB --tokenizer FILE.model]

Every method trains the same model with one seed at each learning rate, then with more seeds at its own best one.
All have the same activation (gelu, also where a method's own is another), rotary positions, vocabulary, optimizer
and, seed by seed, data order: only the method differs. Each run is `launch/pretrain.py` in a process of its own
under --runs. Stop it at any moment and start it again: finished runs are kept, a stopped one goes on.
--out gets trainability.json, .md and .png of the finished runs, after every wave of methods and with --report-only.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.trainability_report import Run, best_lr, name_of, read_run, read_runs, write_report
from stablelm.errors import ConfigError, DivergedError
from stablelm.methods.catalogue import METHODS
from stablelm.supervise.attempts import read_summary

PRETRAIN = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"
DEFAULT_METHODS = (
    "pre_ln,post_ln,deepscalelm_pre,deepscalelm_post,magneto,deepnorm,sigma_reparam,"
    "deepscalelm_sigma,magneto_sigma,catformer,catformer_sigma"
)
FINISHED = (0, DivergedError.exit_code)
FIXED = {
    "model.n_heads": 2,
    "model.activation": "gelu",
    "model.attention.position": "rope",
    "data.lanes": 48,
    "train.schedule": "cosine",
    "train.grad_clip": 1.0,
    "observe.every": 1,
    "evaluate.every": 0,
    "evaluate.micro_batch_size": 32,
    "checkpoint.every": 0,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and the figure")
    parser.add_argument("--data", default="embedded", help="training text, as data.path takes it")
    parser.add_argument("--validation", help="held-out text; may be left out for the embedded corpus")
    parser.add_argument("--tokenizer", default="embedded", help="SentencePiece .model file")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="names, in the order in which they run")
    parser.add_argument("--lrs", default="3e-3,1e-3,1e-2", help="peak learning rates, in the order in which they run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best learning rate; seed 0 takes all rates")
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--warmup", type=int, help="steps of warm-up; by default a tenth of --steps")
    parser.add_argument("--eval-batches", type=int, default=64, help="held-out batches, of --batch sequences")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--report-only", action="store_true", help="report on the runs that are there")
    options = parser.parse_args(argv)
    options.methods = [name.strip() for name in options.methods.split(",")]
    options.lrs = [float(lr) for lr in options.lrs.split(",")]
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} is not a method; choose from {', '.join(METHODS)}")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The overrides that all runs of a folder share."""
    settings = {
        **FIXED,
        "model.n_layers": options.layers,
        "model.d_model": options.d_model,
        "data.path": options.data,
        "data.tokenizer": options.tokenizer,
        "data.seq_len": options.seq_len,
        "train.global_batch_size": options.batch,
        "train.steps": options.steps,
        "train.warmup_steps": options.steps // 10 if options.warmup is None else options.warmup,
        "evaluate.batches": options.eval_batches,
    }
    return settings | ({"data.validation_path": options.validation} if options.validation else {})


def claim(folder: Path, settings: dict[str, Any]) -> int:
    """Makes the folder ours and returns the lock's descriptor, which the runs inherit.

    Raises ConfigError while another driver, or a run that one left behind, works there, and if the runs there have
    other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"--runs {folder} is in use by another start of this program; wait for its end") from error
    file = folder / "settings.json"
    saved = json.loads(file.read_text()) if file.exists() else settings
    differing = sorted(key for key in saved.keys() | settings.keys() if saved.get(key) != settings.get(key))
    if differing:
        raise ConfigError(f"--runs {folder} holds runs with other {', '.join(differing)}; name another folder")
    file.write_text(json.dumps(settings, indent=1) + "\n")
    return lock


class Driver:
    """Starts runs and follows them; one that is finished already is only read."""

    def __init__(self, options: argparse.Namespace, settings: dict[str, Any], lock: int):
        self._options, self._settings, self._lock = options, settings, lock
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._guard = threading.Lock()
        self._started, self._seconds = time.time(), 0.0
        self.total, self.done, self.made = len(options.methods) * (len(options.lrs) + options.seeds - 1), 0, 0
        self.failed: list[str] = []

    def wave(self, runs: Iterable[tuple[str, float, int]]) -> None:
        """Makes (method, lr, seed) each, and a report when all have ended."""
        with ThreadPoolExecutor(self._options.jobs) as pool:
            try:
                list(pool.map(lambda run: self._make(*run), runs))
            except KeyboardInterrupt:
                self._stop()
                raise
        write_report(read_runs(self._options.runs), self._settings, self._options.out)

    def _make(self, method: str, lr: float, seed: int) -> None:
        run_dir = self._options.runs / name_of(method, lr, seed)
        code, seconds = read_summary(run_dir).get("exit_code"), 0.0
        if self._stopping:
            return
        if code not in FINISHED:
            began = time.time()
            code, seconds = self._start(run_dir, method, lr, seed), time.time() - began
        if self._stopping:
            return
        with self._guard:
            self.done += 1
            self._told(run_dir, code, seconds)

    def _start(self, run_dir: Path, method: str, lr: float, seed: int) -> int:
        own = {"run.dir": run_dir, "run.seed": seed, "model.method": method, "train.lr": lr}
        overrides = [f"{key}={value}" for key, value in {**self._settings, **own}.items()]
        with open(f"{run_dir}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(PRETRAIN), *overrides],
                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[self._lock],
            )  # fmt: skip
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        return code

    def _told(self, run_dir: Path, code: int | None, seconds: float) -> None:
        if code not in FINISHED:
            self.failed.append(run_dir.name)
            print(f"{run_dir.name}: exit code {code}, see {run_dir}.log", flush=True)
            return
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # only the curves are compared
        if not seconds:
            return
        self._seconds, self.made = self._seconds + seconds, self.made + 1
        left = (self.total - self.done) * self._seconds / self.made / self._options.jobs
        run = read_run(run_dir)
        print(
            f"{self.done}/{self.total} {run_dir.name}: loss {run.final_loss:.4f}, validation {run.val_loss:.4f}"
            f"{', diverged' if run.diverged else ''}, {seconds:.0f} s; about {left / 60:.0f} min left",
            flush=True,
        )

    def _stop(self) -> None:
        """Asks the runs to save and end; the lock outlives us as long as one has not."""
        self._stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


def work(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """All runs in an order that gives comparisons early, a report after each wave; returns the exit code."""
    lock = claim(options.runs, settings)
    try:
        driver = Driver(options, settings, lock)
        for lr in options.lrs:
            driver.wave((method, lr, 0) for method in options.methods)
        best = best_rates(read_runs(options.runs), options.methods, options.lrs)
        for seed in range(1, options.seeds):
            driver.wave((method, lr, seed) for method, lr in best.items())
    finally:
        os.close(lock)
    print(f"{driver.made} runs made, {driver.total - driver.made} kept or not made; report in {options.out}")
    if driver.failed:
        print(f"failed: {', '.join(driver.failed)}", file=sys.stderr)
    return 1 if driver.failed else 0


def best_rates(runs: list[Run], methods: list[str], lrs: list[float]) -> dict[str, float]:
    """Best learning rate of each method that has finished seed 0 at every rate."""
    own = {m: [run for run in runs if run.method == m and run.seed == 0 and run.lr in lrs] for m in methods}
    return {method: best_lr(found) for method, found in own.items() if len(found) == len(set(lrs))}


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse_arguments(argv)
        if options.report_only:
            file = options.runs / "settings.json"
            if not file.exists():
                raise ConfigError(f"--runs {options.runs} holds no runs; name the folder of an earlier start")
            write_report(read_runs(options.runs), json.loads(file.read_text()), options.out)
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return work(options, settings_of(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
