"""For loggers that cannot take back what they were sent: a figure of a step is sent once, also if it is made again."""

from collections.abc import Iterable
from typing import Any

from stablelm.observe.sinks.metrics_file import COUNTERS
from stablelm.observe.sinks.run_info import RunInfo, Sink, recorded


class Once:
    """Leaves out what `sink` has already of steps that are trained again after a crash or a rewind.

    `knows_the_run`: whether earlier attempts sent their records to it. A step that is trained again after a crash has
    the same figures but for its duration; after a rewind they differ, and these loggers keep what they were before.
    """

    def __init__(self, sink: Sink, info: RunInfo, *, knows_the_run: bool):
        self._sink, self._directory = sink, info.directory
        self._sent = _names(info.recorded, info.step) if knows_the_run else {}

    def write(self, record: dict[str, Any]) -> None:
        sent = self._sent.get(record["step"], ())
        if fresh := figures({name: value for name, value in record.items() if name in COUNTERS or name not in sent}):
            self._sink.write(fresh)

    def rewound(self, step: int) -> None:
        self._sent = _names(recorded(self._directory), step)
        self._sink.rewound(step)

    def close(self, failed: bool) -> None:
        self._sink.close(failed)


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a record, counters among them; {} if it has no others."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return numbers if any(name not in COUNTERS for name in numbers) else {}


def _names(records: Iterable[dict[str, Any]], step: int) -> dict[int, set[str]]:
    """Names of the figures of this step and later ones."""
    found: dict[int, set[str]] = {}
    for record in records:
        if record["step"] >= step:
            found.setdefault(record["step"], set()).update(record)
    return found
