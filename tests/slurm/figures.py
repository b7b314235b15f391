"""How long a run takes to stop and to come back, measured on the test cluster and compared with what we promise.

    python tests/slurm/figures.py [--times 3]

Each round starts a run of 2 nodes x 2 ranks, signals it in two ways, so that it saves and ends with 75, and powers a
node off. Prints a table of medians and ends with 1 where a promise is broken. Needs root, namespaces and Slurm
(tests/slurm/cluster install); a round takes two to three minutes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.programs import TINY
from support.slurm import PACE, Cluster, cluster, missing, records
from support.tiny import make_tiny_corpus

PATIENCE = 600
PACE_SECONDS = 0.5
HEARD = "SIGTERM: saving a checkpoint"
COLD_STARTS = 1.5  # times as long a restart may take as the first start


@dataclass
class Run:
    """The run that is measured."""

    cluster: Cluster
    job: str
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "job.out"

    def seconds_until(self, what: Callable[[], object], since: float) -> float:
        self.cluster.wait(what, self.job, PATIENCE, self.log)
        return time.time() - since

    def attempt(self) -> int:
        return max((record["attempt"] for record in records(self.run_dir)), default=0)

    def told(self, name: str) -> str:
        return self.cluster.about(self.job).get(name, "")

    def last_steps(self, count: int) -> float:
        """Seconds of the last steps together."""
        return sum(record["step_seconds"] for record in records(self.run_dir)[-count:])

    def await_steps(self, count: int) -> None:
        attempt = self.attempt()

        def enough() -> bool:
            return sum(record["attempt"] == attempt for record in records(self.run_dir)) >= count

        self.cluster.wait(enough, self.job, PATIENCE, self.log)


def submit(started: Cluster, folder: Path) -> Run:
    corpus, config = make_tiny_corpus(folder / "corpus"), folder / "empty.yaml"
    config.write_text("{}\n")
    job = started.submit(
        "-N2", "--ntasks-per-node=2", "--time=60", f"--output={folder}/job.out", "slurm/pretrain.sh", str(config),
        *TINY, *corpus.overrides(), "train.steps=100000", "checkpoint.every=20", "engine.kind=ddp",
        f"run.dir={folder}/run", PYTHONPATH=str(PACE), PACE_SECONDS=str(PACE_SECONDS),
    )  # fmt: skip
    return Run(started, job, folder)


def cold_start(run: Run) -> float:
    """From the start of the first attempt to its first step."""
    run.cluster.wait(lambda: run.told("JobState") == "RUNNING", run.job, PATIENCE, run.log)
    return run.seconds_until(lambda: run.attempt() >= 1, time.time())


@dataclass
class Stopped:
    """Seconds from the moment a signal reached the ranks; `delivery` are those before it, from the command on."""

    delivery: float
    committed: float
    ended: float
    promised: float
    """Two steps and the save, as long as these took."""


def stop(run: Run, *options: str) -> Stopped:
    """One signal, its checkpoint and the summary that says 75; waits for the next attempt."""
    run.await_steps(4)
    before, attempt, heard = newest_commit(run.run_dir), run.attempt(), run.log.read_text().count(HEARD)
    asked = time.time()
    run.cluster.client("scancel", *options, run.job)
    _closely(lambda: run.log.read_text().count(HEARD) > heard)
    reached = time.time()
    summary = run.run_dir / "summary.json"

    def stopped() -> bool:
        told = json.loads(summary.read_text()) if summary.exists() else {}
        return told.get("exit_code") == 75 and told.get("attempts") == attempt

    run.cluster.wait(stopped, run.job, PATIENCE, run.log)
    last = newest_commit(run.run_dir)
    assert last is not None and last != before, "the stop left no checkpoint"
    committed, ended = (last / "COMMITTED").stat().st_mtime, summary.stat().st_mtime
    begun = min(path.stat().st_mtime for path in last.rglob("*") if path.is_file())
    promised = run.last_steps(2) + committed - begun
    run.cluster.wait(lambda: run.attempt() > attempt, run.job, PATIENCE, run.log)
    return Stopped(reached - asked, committed - reached, ended - reached, promised)


def _closely(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < end:
        time.sleep(0.01)


def newest_commit(run_dir: Path) -> Path | None:
    return max((path.parent for path in (run_dir / "checkpoints").glob("step-*/COMMITTED")), default=None)


@dataclass
class Returned:
    """Seconds from a node's power-off to the requeue, from there to the start, from there to the next new step."""

    detected: float
    held: float
    started: float


def power_off(run: Run) -> Returned:
    """One node switched off while the run makes steps, and on again once it does so elsewhere."""
    run.await_steps(4)
    attempt, restarts, node = run.attempt(), run.told("Restarts"), run.told("BatchHost")
    since = time.time()
    run.cluster.control("kill-node", node)
    detected = run.seconds_until(lambda: run.told("Restarts") != restarts, since)
    held = run.seconds_until(lambda: run.told("JobState") == "RUNNING", since) - detected
    started = run.seconds_until(lambda: run.attempt() > attempt, since) - detected - held
    run.cluster.control("start-node", node)
    return Returned(detected, held, started)


WAYS = {"TERM to its tasks": ("--signal=TERM",), "USR1 to its script": ("--batch", "--signal=USR1")}
Row = tuple[str, float, float | None]


@dataclass
class Round:
    """What one run gave."""

    cold: float
    stops: dict[str, Stopped]
    returned: Returned


def one_round(started: Cluster) -> Round:
    run = submit(started, Path(tempfile.mkdtemp(prefix="figures.")))
    cold = cold_start(run)
    stops = {name: stop(run, *options) for name, options in WAYS.items()}
    returned = power_off(run)
    started.client("scancel", run.job)
    started.wait_done(run.job, PATIENCE, run.log)
    return Round(cold, stops, returned)


def table(rounds: list[Round]) -> list[Row]:
    """(what, seconds, promise in seconds or None) of each figure, medians of all rounds."""

    def middle(figure: Callable[[Round], float]) -> float:
        return statistics.median(figure(one) for one in rounds)

    rows: list[Row] = []
    for name in WAYS:

        def of_stop(figure: Callable[[Stopped], float], name: str = name) -> float:
            return middle(lambda one: figure(one.stops[name]))

        promised = of_stop(lambda s: s.promised)
        rows += [
            (f"{name}: until it reaches the ranks", of_stop(lambda s: s.delivery), None),
            ("... from there to the committed checkpoint", of_stop(lambda s: s.committed), promised),
            ("... from there to `summary.json` with 75", of_stop(lambda s: s.ended), promised),
        ]
    slurm = middle(lambda one: one.returned.detected + one.returned.held)
    allowed = middle(lambda one: COLD_STARTS * one.cold)
    started = middle(lambda one: one.returned.started)
    rows += [
        ("cold start, from the job's start to the first step", middle(lambda one: one.cold), None),
        ("node powered off: until Slurm notices", middle(lambda one: one.returned.detected), None),
        ("... in the queue", middle(lambda one: one.returned.held), None),
        ("... from the job's start to the next new step", started, allowed),
        ("... in all", slurm + started, slurm + allowed),
    ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="rounds")
    options = parser.parse_args()
    if missing():
        print(f"cannot measure here: {missing()}", file=sys.stderr)
        return 2
    with cluster(3, STC_CPUS="4") as started:
        rows = table([one_round(started) for _ in range(options.times)])
    print("| seconds | measured | promised at most |\n|---|---|---|")
    for what, seconds, promise in rows:
        print(f"| {what} | {seconds:.2f} | {'' if promise is None else f'{promise:.2f}'} |")
    return int(any(promise is not None and seconds > promise for _, seconds, promise in rows))


if __name__ == "__main__":
    sys.exit(main())
