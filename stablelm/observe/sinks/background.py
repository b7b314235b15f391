"""A logger at work in a thread of its own: what it waits for or fails at neither slows training down nor ends it."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from stablelm.observe.sinks.run_info import Sink

QUEUED = 10_000
"""Records that wait at most, for instance while a server does not answer; later ones are not sent."""
CLOSE_SECONDS = 60.0
FAILED_SECONDS = 10.0
"""Longest wait at the end of an attempt for what is still to be sent, and after a failure."""


class Background:
    """Passes everything on to the sink that `make` opens. After its first failure a warning is shown, and no more sent.

    `name`: as `observe.sinks` names it; `warn` takes a line for the terminal, from any thread.
    """

    def __init__(self, name: str, make: Callable[[], Sink], warn: Callable[[str], None]):
        self._name, self._warn = name, warn
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(QUEUED)
        self._full = False
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"sink-{name}", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        self._put(lambda sink: sink.write(record))

    def rewound(self, step: int) -> None:
        self._put(lambda sink: sink.rewound(step))

    def close(self, failed: bool) -> None:
        self._put(lambda sink: sink.close(failed))
        seconds = FAILED_SECONDS if failed else CLOSE_SECONDS
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"has not taken all records after {seconds:.0f} s at the end")

    def _put(self, act: Callable[[Sink], None] | None) -> None:
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            if not self._full:
                self._full = True
                self._say(f"is {QUEUED} records behind and misses some")

    def _work(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
            del make  # with the records of earlier attempts
            while (act := self._queue.get()) is not None:
                act(sink)
        except Exception as error:
            self._say(f"takes no more records of this attempt ({type(error).__name__}: {_first_line(error)})")
            while self._queue.get() is not None:
                pass

    def _say(self, what: str) -> None:
        self._warn(f"warning: observe.sinks: {self._name} {what}; training continues, and metrics.jsonl has them all")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
