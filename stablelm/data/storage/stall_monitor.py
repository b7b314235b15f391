"""Which reads of this process wait for a store: printed to stderr, and read by the heartbeat and the metrics."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from stablelm.printable import printable

# Seconds of waiting before the first line on stderr, and between the following ones.
FIRST_LINE, NEXT_LINES = 10.0, 60.0


@dataclass
class Wait:
    """A read that failed and is tried again, or takes long: `since` in seconds since the epoch, `cause` of the wait."""

    file: str
    attempt: int
    since: float
    cause: str


_waits: dict[int, Wait] = {}
_reads: dict[int, Wait] = {}  # under way; one that takes long becomes a wait
_waited, _waits_since = 0.0, float("nan")  # seconds that are over, and since when there have been waits now
_relayed: dict[int, list[Wait]] = {}  # of worker processes, which print them to stderr themselves
_lock = threading.Lock()
_watcher: threading.Thread | None = None


def waiting() -> list[Wait]:
    """The reads that wait now, longest first."""
    with _lock:
        own = [Wait(**vars(wait)) for wait in _waits.values()]
        return sorted(chain(own, *_relayed.values()), key=lambda wait: wait.since)


def waited_seconds() -> float:
    """Seconds since this process began in which one read or more waited."""
    with _lock:
        return _waited + (time.monotonic() - _waits_since if _waits or _relayed else 0.0)


@contextmanager
def _changing() -> Iterator[None]:
    """Holds the lock for a change of what waits, and keeps count of the time."""
    global _waited, _waits_since
    with _lock:
        before, now = bool(_waits or _relayed), time.monotonic()
        yield
        if before and not (_waits or _relayed):
            _waited += now - _waits_since
        elif not before:
            _waits_since = now


def relay(worker: object, waits: list[Wait]) -> None:
    """What waits now in a worker process, in place of what it reported before."""
    with _changing():
        _relayed.pop(id(worker), None)
        if waits:
            _relayed[id(worker)] = list(waits)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """A request inside the with block that takes more than FIRST_LINE seconds is among those that wait, too."""
    read = Wait(file, 1, time.time(), "none, but the store is slow")
    with _lock:
        _reads[id(read)] = read
        _watched()
    try:
        yield
    finally:
        with _changing():
            del _reads[id(read)]
            _waits.pop(id(read), None)


@contextmanager
def noted(wait: Wait) -> Iterator[None]:
    """`wait` is among those that wait inside the with block."""
    with _changing():
        _waits[id(wait)] = wait
        _watched()
    try:
        yield
    finally:
        with _changing():
            del _waits[id(wait)]


def _watched() -> None:
    """Starts the watcher if need be; with the lock held."""
    global _watcher
    # A thread does not survive a fork, but the note of it does.
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, name="data-waiting", daemon=True)
        _watcher.start()


def line(waits: list[Wait]) -> str:
    """One line about those that wait."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    wait, *others = waits
    more = f" and {len(others)} more reads" if others else ""
    return (
        f"{rank}waiting for {wait.file}{more}: {time.time() - wait.since:.0f} s, "
        f"attempt {wait.attempt}, last failure: {wait.cause}"
    )


def _watch() -> None:
    global _watcher
    printed = float("-inf")
    while True:
        with _lock:
            if not _waits and not _reads:
                _watcher = None
                return
            slow = {id(read): read for read in _reads.values() if time.time() - read.since >= FIRST_LINE}
        with _changing():
            failed = {wait.file for wait in _waits.values()}
            _waits.update((key, read) for key, read in slow.items() if key in _reads and read.file not in failed)
            waits = sorted((Wait(**vars(wait)) for wait in _waits.values()), key=lambda wait: wait.since)
        now = time.time()
        if waits and now - waits[0].since >= FIRST_LINE and now - printed >= NEXT_LINES:
            printed = now
            print(printable(line(waits)), file=sys.stderr, flush=True)
        time.sleep(min(FIRST_LINE, NEXT_LINES, 1.0) / 2)
