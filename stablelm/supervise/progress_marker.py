"""Where a rank is in its work: set by the loop, read by the threads that watch it."""

import sys
import time
from types import FrameType
from typing import NamedTuple


class Beat(NamedTuple):
    """`count`: places reached before it, comparable between ranks; `since`: seconds since 1970 of its reaching."""

    count: int
    step: int
    phase: str
    place: str
    since: float

    def words(self) -> str:
        """`step 12, data` or `step 12, step (micro-batch 2 of 4)`."""
        return f"step {self.step}, {self.phase}" + (f" ({self.place})" if self.place else "")


class Pulse:
    """The last place that the main thread reached."""

    def __init__(self) -> None:
        self.now = Beat(0, 0, "starting", "", time.time())
        self.steps = 0
        """Steps that this attempt has finished."""

    def at(self, phase: str, step: int) -> None:
        """A phase begins: starting, data, step, record, evaluate, save, rewind, ending."""
        self.now = Beat(self.now.count + 1, step, phase, "", time.time())

    def reached(self, place: str) -> None:
        """Progress inside the phase."""
        now = self.now
        self.now = Beat(now.count + 1, now.step, now.phase, place, time.time())

    def finished(self, step: int) -> None:
        """A step is finished; what comes until the next one are records, layers and agreements."""
        self.steps += 1
        self.at("record", step)


def waits_for(thread: int) -> str:
    """Function, file and line at which a thread is, in this code's own words: `all_reduce (c10d.py:31)`."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else f"{frame.f_code.co_name} ({_file(frame)}:{frame.f_lineno})"


def in_collective(thread: int) -> bool:
    """Whether a thread is inside a function of torch.distributed, waiting for other ranks that is."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename.replace("\\", "/"):
            return not frame.f_code.co_filename.endswith("/run.py")
        frame = frame.f_back
    return False


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
