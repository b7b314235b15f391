"""When a rank is stuck, and which rank holds up the others, by how far each of them is."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from stablelm.config.schema import Config
from stablelm.data.storage.stall_monitor import waiting
from stablelm.data.storage.stores import STALL_SECONDS
from stablelm.supervise.progress_marker import ProgressMarker
from stablelm.supervise.rank_store import RankStore

NAMED = 3
READING = ("starting", "data", "record")
"""Phases in which the main thread itself may wait for data; in others only the threads that read ahead do."""


class HangDetector:
    """Whether the main thread of a rank is stuck; `notes` are shared with the other ranks.

    `stall_seconds`: how long a read may take before it counts as failed and is retried.
    """

    def __init__(
        self, marker: ProgressMarker, config: Config, notes: RankStore, rank: int, stall_seconds: float = STALL_SECONDS
    ):
        self.extra_seconds: dict[str, float] = {}
        """By phase: seconds added to the hang time-out."""
        self._marker, self._observe, self._notes, self._rank = marker, config.observe, notes, rank
        self._retry_budget, self._stall_seconds = config.data.retry_budget, stall_seconds
        self._seen, self._unchanged = self._position(), 0.0
        self._last_wait: Any = None

    def stuck(self, passed: float) -> bool:
        """Whether nothing has changed for too long; `passed`: seconds since the last call."""
        if self._position() != self._seen:
            self._seen, self._unchanged = self._position(), 0.0
            return False
        limit = self._observe.hang_seconds if self._marker.steps else self._observe.first_step_seconds
        limit += self.extra_seconds.get(self._marker.now.phase, 0.0)
        if self._waits_for_data():
            self._notes.put("wait", [self._rank, time.time()])
            return False
        before, self._unchanged = self._unchanged, self._unchanged + passed
        if before < limit / 2 <= self._unchanged:
            self._last_wait = self._notes.get("wait")
        if self._unchanged < limit:
            return False
        last, self._last_wait = self._last_wait, self._notes.get("wait")
        if self._last_wait != last:  # another rank waits for data, and this one for it
            self._unchanged = limit / 2
            return False
        return True

    def _position(self) -> Any:
        return self._marker.now, self._marker.progress()

    def _waits_for_data(self) -> bool:
        """Whether the main thread waits for a read that is being retried, or that has not failed yet."""
        now, marker = time.time(), self._marker.now
        if marker.phase == "data" and now - marker.since < self._stall_seconds:
            return True
        oldest = now - self._retry_budget - self._stall_seconds  # the last try may go beyond the budget
        return marker.phase in READING and any(wait.since > oldest for wait in waiting())


def diagnose(notes: Mapping[int, dict[str, Any] | None], hosts: Sequence[str]) -> str:
    """One sentence: the ranks that do not answer, else those that have finished least, else that none is behind.

    `notes`: the positions that the watchdogs share, by rank; None where a rank shares none.
    """
    silent = [rank for rank, note in notes.items() if note is None]
    if silent:
        return f"{_ranks(silent, hosts)} {'do' if len(silent) > 1 else 'does'} not answer"
    found: dict[int, dict[str, Any]] = {rank: note for rank, note in notes.items() if note is not None}
    least = min(tuple(note["progress"]) for note in found.values())
    behind = [rank for rank, note in found.items() if tuple(note["progress"]) == least]
    note = found[behind[0]]
    position = f"{note['where']} for {note['seconds']:.0f} s, last finished {note['finished']}"
    if len(found) > 1 and len(behind) == len(found):
        waits = ", ".join(f"rank {rank} in {found[rank]['waits_for']}" for rank in behind[:NAMED])
        return f"all {len(found)} ranks are stuck at the same place, none behind the others: {position} ({waits})"
    return f"{_ranks(behind, hosts)} {'are' if len(behind) > 1 else 'is'} stuck: {position} (in {note['waits_for']})"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:NAMED])
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
