"""Punishes one run on the test cluster until many faults have struck, then compares it with an undisturbed one.

    python tests/slurm/soak.py --faults 30 --seed 1 --out docs/soak.md

Needs root, namespaces and Slurm (tests/slurm/cluster install). Ends with 1 where the run did not finish by itself, a
loss differs in any bit, a step was committed by an attempt that a newer one had replaced, or more was computed again
than one checkpoint interval a fault.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support import programs
from support.programs import TINY, losses, summary
from support.punisher import DATA_HOST, DATA_PORT, HARMLESS, KINDS, DataServer, Target, nothing, plan
from support.slurm import LAST_STATES, PACE, Cluster, cluster, missing, records
from support.tiny import TinyCorpus, make_tiny_corpus

EVERY = 20  # steps between checkpoints
STEPS_A_FAULT = 40
NODES, RANKS = 4, 4
RECOVERY_SECONDS = 420  # longer than any fault's recovery, the watchdog's patience included
STRIKES_A_COMMIT = 2  # three attempts without a commit would end the job, as they should


@dataclass
class Strike:
    """One fault and what became of it; times in seconds since it struck, None where that did not happen."""

    kind: str
    at: float
    step: int
    attempt: int
    requeued: float | None = None
    begun: float | None = None
    recovered: float | None = None


@dataclass
class Soak:
    """The run under punishment and everything seen of it."""

    target: Target
    run_dir: Path
    pace: Path
    steps: int
    started: float = field(default_factory=time.monotonic)
    strikes: list[Strike] = field(default_factory=list)
    cold_start: float = 0.0

    def now(self) -> float:
        return time.monotonic() - self.started

    def job(self) -> dict[str, str]:
        try:
            return self.target.cluster.about(self.target.job)
        except AssertionError:  # the controller is away
            return {}

    def restarts(self) -> int:
        return int(self.job().get("Restarts", "-1"))

    def made(self) -> tuple[int, int]:
        """The highest step and the newest attempt seen in the records."""
        found = records(self.run_dir)
        return max((r["step"] for r in found), default=0), max((r["attempt"] for r in found), default=0)

    def newest_commit(self) -> int:
        folders = (self.run_dir / "checkpoints").glob("step-*")
        return max((int(path.name[5:]) for path in folders), default=0)

    def starts(self) -> int:
        """Attempts that the job's script has begun."""
        try:
            return (self.run_dir / "slurm" / "attempts.jsonl").read_text().count('"from_step"')
        except OSError:
            return 0

    def hold_back(self, planned: int) -> None:
        """Slows the run down where it would finish before all faults have struck."""
        share = (len(self.strikes) + 0.5) / planned
        self.pace.write_text("0.02" if self.made()[0] < share * self.steps else "1")

    def until(self, what, seconds: float, planned: int) -> bool:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end or self.job().get("JobState") in LAST_STATES:
                return bool(what())
            self.hold_back(planned)
            time.sleep(0.5)
        return True


def strike(soak: Soak, kind: str, planned: int) -> bool:
    """One fault, its recovery and its repair; False where the run did not recover."""
    drawer = soak.target.drawer
    recent = [s.step for s in soak.strikes[-STRIKES_A_COMMIT:]]
    if len(recent) == STRIKES_A_COMMIT and not soak.until(
        lambda: soak.newest_commit() > recent[0], RECOVERY_SECONDS, planned
    ):
        return False
    wanted = soak.made()[0] + drawer.randint(0, EVERY)
    if not soak.until(lambda: soak.made()[0] >= wanted, RECOVERY_SECONDS, planned):
        return False
    step, attempt = soak.made()
    restarts, starts = soak.restarts(), soak.starts()
    one = Strike(kind, soak.now(), step, attempt)
    repair = KINDS[kind](soak.target)
    if repair is None:
        return strike(soak, kind, planned)
    soak.strikes.append(one)
    print(f"{soak.now():7.1f} s  {len(soak.strikes):3}. {kind} at step {step}, attempt {attempt}", flush=True)

    def recovered() -> bool:
        step_now, attempt_now = soak.made()
        if one.requeued is None and soak.restarts() > restarts:
            one.requeued = soak.now() - one.at
        if one.begun is None and soak.starts() > starts:
            one.begun = soak.now() - one.at
        return attempt_now > attempt or (kind in HARMLESS and step_now > step + 1)

    well = soak.until(recovered, RECOVERY_SECONDS, planned)
    one.recovered = soak.now() - one.at if well else None
    (repair or nothing)()
    return well


def settings(corpus: TinyCorpus, run_dir: Path, steps: int, *more: str) -> list[str]:
    return [
        *TINY, *corpus.overrides(), f"train.steps={steps}", f"checkpoint.every={EVERY}", "checkpoint.keep=100000",
        "engine.kind=ddp", f"run.dir={run_dir}", *more,
    ]  # fmt: skip


def submit(cluster: Cluster, corpus: TinyCorpus, folder: Path, steps: int) -> str:
    config, files = folder / "empty.yaml", "tiny-train.{00000..00003}-of-00004.json.gz"
    config.write_text("{}\n")
    served = [
        f"data.path=http://{DATA_HOST}:{DATA_PORT}/train/{files}", "data.retry_budget=20", "observe.hang_seconds=20",
        "observe.first_step_seconds=90",
    ]  # fmt: skip
    return cluster.submit(
        "-N2", "--ntasks-per-node=2", "--time=60", f"--output={folder}/job.out", "slurm/pretrain.sh", str(config),
        *settings(corpus, folder / "run", steps, *served), PYTHONPATH=str(PACE), PACE_SECONDS=str(folder / "pace"),
        STABLELM_BACKOFF_SECONDS="5",
    )  # fmt: skip


def punish(soak: Soak, kinds: list[str], seconds: float) -> None:
    """Strikes all planned faults, then lets the run finish; ends early where it does not recover or time is up."""
    if not soak.until(lambda: soak.made()[0] >= 1, RECOVERY_SECONDS, len(kinds)):
        return
    soak.cold_start = soak.now()
    for kind in kinds:
        if soak.now() > seconds or not strike(soak, kind, len(kinds)):
            print(f"ends after {len(soak.strikes)} faults", flush=True)
            break
        if kind == "time limit":
            soak.target.cluster.client("scontrol", "update", f"JobId={soak.target.job}", "TimeLimit=60")
    soak.pace.write_text("0")
    end = time.monotonic() + RECOVERY_SECONDS
    while soak.job().get("JobState", "") not in LAST_STATES and time.monotonic() < end:
        time.sleep(1)


def recomputed(run_dir: Path) -> dict[int, int]:
    """Steps that each attempt made again, though an earlier attempt had made them."""
    again: dict[int, int] = {}
    highest = 0
    for record in records(run_dir):
        if record["attempt"] not in again:
            again[record["attempt"]] = max(0, highest - record["step"] + 1)
        highest = max(highest, record["step"])
    return again


def problems(soak: Soak, expected: dict[int, float]) -> list[str]:
    """What is wrong with the punished run; empty where it is as it should be."""
    from stablelm.checkpoint import manifest

    found, run_dir = [], soak.run_dir
    state, said = soak.job().get("JobState"), summary(run_dir)
    if state != "COMPLETED" or said["exit_code"] != 0:
        found.append(f"the job is {state} and the run's exit code {said['exit_code']}: {said['reason']}")
    got = losses(run_dir)
    different = sorted(step for step in expected if got.get(step) != expected[step])
    if different:
        found.append(f"{len(different)} losses differ, the first at step {different[0]}")
    commits = [manifest.read_commit(path) for path in sorted((run_dir / "checkpoints").glob("step-*"))]
    if any(later.token < earlier.token for earlier, later in pairwise(commits)):
        found.append("a step was committed by an attempt that a newer one had replaced")
    damaged = [path.name for path in sorted((run_dir / "checkpoints").glob("step-*")) if manifest.verify(path)]
    if damaged:
        found.append(f"damaged checkpoints: {damaged}")
    again = recomputed(run_dir)
    if max(again.values(), default=0) > EVERY:
        found.append(f"more than {EVERY} steps were made again by one attempt: {again}")
    if said.get("tokens") != len(expected) * 12 * 32:
        found.append(f"{said.get('tokens')} tokens instead of {len(expected) * 12 * 32}")
    return found


def report(soak: Soak, command: str, seed: int, wrong: list[str]) -> str:
    """The Markdown page."""
    kinds = {kind: [s for s in soak.strikes if s.kind == kind] for kind in KINDS}
    struck = {kind: found for kind, found in kinds.items() if found}
    again = recomputed(soak.run_dir)

    def middle(values: list[float | None]) -> str:
        seen = [value for value in values if value is not None]
        return f"{statistics.median(seen):.0f}" if seen else "–"

    lines = [
        "# Soak", "",
        f"`{command}`: {len(soak.strikes)} faults of {len(struck)} kinds struck a run of {soak.steps} steps on "
        f"{RANKS} ranks and 2 of {NODES} nodes of the test cluster (seed {seed}, {platform.system()}, "
        f"{soak.now() / 60:.0f} minutes).", "",
        "**" + ("; ".join(wrong) or "The run finished by itself; every loss equals the undisturbed run's bit for bit.")
        + "**", "",
        f"- attempts of the job: {soak.starts()}; commits: {len(list((soak.run_dir / 'checkpoints').glob('step-*')))}, "
        "none by an attempt that a newer one had replaced" + (" (but see above)" if wrong else ""),
        f"- steps made again: {sum(again.values())} in all, at most {max(again.values(), default=0)} by one attempt "
        f"(a checkpoint every {EVERY})",
        f"- cold start, from sbatch to the first step: {soak.cold_start:.0f} s", "",
        "Medians in seconds from the fault; – where the job was not interrupted.", "",
        "| fault | times | back in the queue | next attempt begins | first step after it |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, found in struck.items():
        times = [middle([getattr(s, name) for s in found]) for name in ("requeued", "begun", "recovered")]
        lines.append(f"| {kind} | {len(found)} | {' | '.join(times)} |")
    lines += ["", "Each fault: second, kind, step and attempt that it struck, seconds to the first step after it.", ""]
    for one in soak.strikes:
        lines.append(
            f"- {one.at:.0f} s: {one.kind}, step {one.step}, attempt {one.attempt}, {middle([one.recovered])} s"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"separated by commas; default: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="no fault strikes after so long")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the report")
    parser.add_argument("--folder", type=Path, help="keep the run here; default: a temporary folder")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if missing():
        print(f"cannot soak here: {missing()}", file=sys.stderr)
        return 2
    kinds, drawer = [kind.strip() for kind in options.kinds.split(",")], random.Random(options.seed)
    planned = plan(options.faults, kinds, drawer)
    steps = STEPS_A_FAULT * len(planned)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak."))
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_tiny_corpus(folder / "corpus")
    done = programs.run("pretrain", *settings(corpus, folder / "undisturbed", steps), processes=RANKS, timeout=1800)
    assert done.returncode == 0, done.stderr
    (folder / "pace").write_text("0.02")
    with cluster(NODES, STC_CPUS="4", STC_SLURMD_TIMEOUT="10", STC_MESSAGE_TIMEOUT="10") as started:
        server = DataServer(started, corpus.folder)
        try:
            time.sleep(2)
            job = submit(started, corpus, folder, steps)
            soak = Soak(Target(started, job, server, drawer, RANKS), folder / "run", folder / "pace", steps)
            punish(soak, planned, options.minutes * 60)
            wrong = problems(soak, losses(folder / "undisturbed"))
        finally:
            server.stop()
    command = "python tests/slurm/soak.py " + " ".join(sys.argv[1:])
    text = report(soak, command, options.seed, wrong)
    print(text)
    if options.out:
        options.out.write_text(text)
    (folder / "strikes.json").write_text(json.dumps([one.__dict__ for one in soak.strikes], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
