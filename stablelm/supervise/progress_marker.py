"""How far a rank is: written by the loop, evaluations and saves; read by the threads that watch.

Every rank passes the same places in the same order, so their number compares ranks: who is behind holds the others up.
What a thread waits in does not tell: under NCCL a rank that waits for others sits in a copy or an event.
"""

import sys
import time
from typing import NamedTuple


class Marker(NamedTuple):
    """The phase that is under way, and at which place in it; `since`: seconds since 1970.

    `passed` is the number of places passed before, `finished` the last of them in words.
    """

    passed: int
    step: int
    phase: str
    place: str
    since: float
    finished: str

    def words(self) -> str:
        """`step 12, data` or `step 12, forward (micro-batch 2 of 4)`."""
        return f"step {self.step}, {self.phase}" + (f" ({self.place})" if self.place else "")


class ProgressMarker:
    """The last place that the main thread reached, and the last part of a save, which another thread may make."""

    def __init__(self) -> None:
        self.now = Marker(0, 0, "starting", "", time.time(), "nothing")
        self.steps = 0
        """Steps that this attempt has finished."""
        self.save_parts = 0
        """Parts of saves that this attempt has finished."""
        self._save_part, self._parts_before = "", 0

    def at(self, phase: str, step: int, place: str = "") -> None:
        """A phase begins, and the one before is finished.

        Phases: starting, dry run, data, step, forward, backward, update, record, evaluation, save, rewind.
        """
        before = self.now
        if (phase, step) != (before.phase, before.step):
            self._parts_before = self.save_parts
        self.now = Marker(before.passed + 1, step, phase, place, time.time(), before.words())

    def reached(self, place: str) -> None:
        """The next place inside the phase."""
        self.at(self.now.phase, self.now.step, place)

    def passed(self) -> None:
        """A place without a name, such as an exchange with the other ranks."""
        self.now = self.now._replace(passed=self.now.passed + 1, since=time.time())

    def in_step(self, phase: str, place: str) -> None:
        """A phase of the same step begins."""
        self.at(phase, self.now.step, place)

    def finished(self, step: int) -> None:
        """A step is finished; records, layers and agreements come before the next one."""
        self.steps += 1
        self.at("record", step)

    def saved_part(self, part: str) -> None:
        """A save has finished a part, `step 12, save (tensors)`, in whichever thread it runs."""
        self._save_part = part
        self.save_parts += 1

    def progress(self) -> tuple[int, int]:
        """What compares ranks: places passed, and parts of saves where the rank waits for a save."""
        now = self.now
        return now.passed, self.save_parts if now.phase == "save" else 0

    def last_finished(self) -> str:
        """In words, for a message."""
        now = self.now
        in_save = now.phase == "save" and self.save_parts > self._parts_before
        return self._save_part if in_save else now.finished


def waits_in(thread: int) -> str:
    """Function, file and line at which a thread is, for people: `all_reduce (c10d.py:31)`."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    file = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"
