"""One run under punishment: strikes it, waits until it has recovered, and sees what it does meanwhile."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.punisher import HARMLESS, KINDS, Target
from support.slurm import LAST_STATES, records

EVERY = 20  # steps between checkpoints
RECOVERY_SECONDS = 480  # longer than any fault's recovery on a busy machine, the watchdog's patience included
STRIKES_A_COMMIT = 2  # three attempts without a commit would end the job, as they should
SPARE_NODES = 1  # a fault waits until no more nodes than this are away
LOOK_SECONDS = 1.0
SAY_SECONDS = 60
FAST, SLOW, UNSLOWED = "0.02", "1", "0"  # seconds added to each step


@dataclass
class Strike:
    """One fault and what became of it; seconds since it struck, None where that did not happen."""

    kind: str
    at: float
    """Seconds since the submission."""
    time: float
    """The same as `time.time()`."""
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
    planned: list[str]
    started: float = field(default_factory=time.monotonic)
    strikes: list[Strike] = field(default_factory=list)
    cold_start: float = 0.0
    commits: dict[str, bytes] = field(default_factory=dict)
    """COMMITTED by name of the checkpoint, as it was when first seen."""
    rewritten: set[str] = field(default_factory=set)

    def now(self) -> float:
        return time.monotonic() - self.started

    def say(self, words: str) -> None:
        print(f"{self.now():7.1f} s  {words}", flush=True)

    def job(self) -> dict[str, str]:
        try:
            return self.target.cluster.about(self.target.job)
        except AssertionError:  # the controller is away
            return {}

    def ended(self) -> bool:
        return self.job().get("JobState") in LAST_STATES

    def restarts(self) -> int:
        return int(self.job().get("Restarts", "-1"))

    def made(self) -> tuple[int, int]:
        """The highest step and the newest attempt seen in the records."""
        found = records(self.run_dir)
        return max((r["step"] for r in found), default=0), max((r["attempt"] for r in found), default=0)

    def look_at_commits(self) -> None:
        """Notes what is new, and what is no longer as it was: a step that was committed twice."""
        for path in (self.run_dir / "checkpoints").glob("step-*/COMMITTED"):
            told = path.read_bytes()
            if self.commits.setdefault(path.parent.name, told) != told:
                self.rewritten.add(path.parent.name)

    def newest_commit(self) -> int:
        self.look_at_commits()
        return max((int(name[5:]) for name in self.commits), default=0)

    def starts(self) -> int:
        """Attempts that the job's script has begun."""
        try:
            return (self.run_dir / "slurm" / "attempts.jsonl").read_text().count('"from_step"')
        except OSError:
            return 0

    def hold_back(self) -> None:
        """Slows the run down where it would finish before all faults have struck."""
        share = (len(self.strikes) + 0.5) / len(self.planned)
        self.pace.write_text(FAST if self.made()[0] < share * self.steps else SLOW)

    def until(self, what: Callable[[], object], why: str, seconds: float = RECOVERY_SECONDS) -> bool:
        """Whether `what` came true in time and before the job's end; says once a minute what is waited for."""
        begun, said = self.now(), self.now()
        while not what():
            if self.now() - begun > seconds or self.ended():
                return bool(what())
            if self.now() - said > SAY_SECONDS:
                said = self.now()
                step, attempt = self.made()
                told = self.job()
                state = f"{told.get('JobState', 'controller away')} {told.get('Reason', '')}"
                self.say(f"     waits {said - begun:.0f} s for {why}: step {step}, attempt {attempt}, job {state}")
            self.target.tend()
            self.hold_back()
            time.sleep(LOOK_SECONDS)
        return True


def punish(soak: Soak, seconds: float) -> None:
    """Strikes all planned faults, then lets the run finish; ends early where it does not recover or time is up."""
    if not soak.until(lambda: soak.made()[0] >= 1, "the first step"):
        return
    soak.cold_start = soak.now()
    soak.say(f"first step; {len(soak.planned)} faults to come")
    for kind in soak.planned:
        if soak.now() > seconds:
            soak.say("no time left for more faults")
            break
        if not strike(soak, kind):
            soak.say(f"ends after {len(soak.strikes)} faults: no recovery, or the run is at its end")
            break
    soak.pace.write_text(UNSLOWED)
    end = time.monotonic() + RECOVERY_SECONDS
    while not soak.ended() and time.monotonic() < end:
        soak.target.tend()
        time.sleep(1)
    soak.look_at_commits()
    soak.say(f"the job is {soak.job().get('JobState', 'unknown')}")


def strike(soak: Soak, kind: str) -> bool:
    """One fault, its recovery and its repair; False where the run did not recover."""
    if not _ready(soak, kind):
        return False
    deadline = soak.now() + RECOVERY_SECONDS
    while True:
        restarts, starts = soak.restarts(), soak.starts()
        step, attempt = soak.made()
        one = Strike(kind, soak.now(), time.time(), step, attempt)
        repair = KINDS[kind](soak.target)
        if repair is not None:
            break
        if soak.now() > deadline or soak.ended():
            return False
        time.sleep(LOOK_SECONDS)  # there was nothing to strike: the job is between two attempts
    soak.strikes.append(one)
    soak.say(f"{len(soak.strikes):3}. {kind} at step {step}, attempt {attempt}")

    def recovered() -> bool:
        step_now, attempt_now = soak.made()
        if one.requeued is None and soak.restarts() > restarts:
            one.requeued = soak.now() - one.at
        if one.begun is None and soak.starts() > starts:
            one.begun = soak.now() - one.at
        return attempt_now > attempt or (kind in HARMLESS and step_now > step + 1)

    well = soak.until(recovered, f"recovery from: {kind}")
    one.recovered = soak.now() - one.at if well else None
    repair()
    return well


def _ready(soak: Soak, kind: str) -> bool:
    """Waits for the moment of the next fault: commits and nodes enough, then a step drawn at random."""
    recent = deque((s.step for s in soak.strikes), maxlen=STRIKES_A_COMMIT)
    if len(recent) == STRIKES_A_COMMIT and not soak.until(lambda: soak.newest_commit() > recent[0], "a new commit"):
        return False
    if not soak.until(lambda: soak.target.away() <= SPARE_NODES, "its nodes"):
        return False
    wanted = soak.made()[0] + soak.target.drawer.randint(0, EVERY)
    return soak.until(lambda: soak.made()[0] >= wanted, f"step {wanted}, the moment of: {kind}")
