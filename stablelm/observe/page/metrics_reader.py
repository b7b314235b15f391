"""metrics.jsonl, read once from front to back in bounded memory, and from where it ended when it has grown.

`sinks.read_metrics` holds every record and refuses a damaged file; a page shows what can be read of any run.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from stablelm import quick_json
from stablelm.observe.page.curves import Curve, LayerMap
from stablelm.observe.sinks import COUNTERS, SAMPLES
from stablelm.small_files import open_regular

LONGEST_LINE = 32 << 20
MOST_CURVES, MOST_MAPS, MOST_LAYERS, MOST_EVENTS = 256, 32, 8192, 400
_OF_LAYER = re.compile(r"(layer|attention|sigma)/([0-9]{4,5})/(.+)", re.DOTALL)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
COUNTED = {"skipped_steps": "skipped", "spikes": "spike"}
"""Counters of which an increase is an event, and its kind."""


@dataclass(slots=True)
class Event:
    """Something that happened between records: `kind` at steps `first` to `last`, `count` times.

    Kinds: attempt (`count`: its number; `reached`: the step that the run had reached before), rewind (`reached`
    too), changed (`what`: keys with their values before and after), skipped, spike, not_finite.
    """

    kind: str
    first: int
    last: int
    count: int
    reached: int = 0
    what: str = ""


class MetricsReader:
    """What a page shows of a metrics.jsonl: curves by metric, maps by metric of layers, events and samples.

    `maps` has layers from `layer/0000`, `attention/0001` or `sigma/0001` on.
    """

    def __init__(self, path: Path):
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._at = self._line = self._inode = 0
        self.curves: dict[str, Curve] = {}
        self.maps: dict[str, LayerMap] = {}
        self.events: list[Event] = []
        self.omitted_events = self.omitted_metrics = 0
        self.samples: dict[int, list[dict[str, str]]] = {}
        self.damaged: list[int] = []
        """Numbers of the first lines that are not records."""
        self.damaged_count = 0
        self.step, self.tokens, self.attempt = 0, 0, 0
        self.seconds = 0.0
        """Time in training steps, over all attempts."""
        self._counted: dict[str, float] = {}
        self._interval = 1
        self._places: dict[str, tuple[str, int] | None] = {}

    def unread_bytes(self) -> int:
        """How much `update` would read."""
        try:
            size = self._path.stat().st_size
        except OSError:
            return 0
        return size - self._at if size >= self._at else size

    def update(self) -> None:
        """Takes in the complete lines that were added; all of them if it is another file now. Raises OSError."""
        with open(open_regular(self._path), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < self._at or (self._at and status.st_ino != self._inode):
                self._clear()
            self._inode = status.st_ino
            file.seek(self._at)
            while line := _line(file):
                self._line += 1
                self._at = file.tell()
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = quick_json.loads(line)
        except quick_json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not _is_count(record.get("step")):
            self.damaged_count += 1
            if self.damaged_count <= 3:
                self.damaged.append(self._line)
            return
        step = record["step"]
        self._note_attempt(record, step)
        if "loss" in record:
            self._note_training(record, step)
        if isinstance(samples := record.get(SAMPLES), list):
            self._keep_samples(step, samples)
        if isinstance(changes := record.get("changes"), dict):
            self._event(Event("changed", step, step, len(changes), what=_in_words(changes)))
        self._add(record, step)

    def _note_attempt(self, record: Mapping[str, Any], step: int) -> None:
        attempt = record.get("attempt")
        if _is_count(attempt) and attempt != self.attempt:
            # The run begins at step 0, not at the step of its first record.
            first = step if self.step else 0
            self.attempt = attempt
            self._event(Event("attempt", first, first, attempt, reached=self.step))

    def _note_training(self, record: Mapping[str, Any], step: int) -> None:
        """Advances counters; a step that was made before replaces what came after it."""
        rewinds = _number(record.get("rewinds")) or 0.0
        if step <= self.step:
            if rewinds > self._counted.get("rewinds", 0.0):
                self._event(Event("rewind", step, step, 1, reached=self.step))
            for series in (*self.curves.values(), *self.maps.values()):
                series.forget(step)
        else:
            self._interval = step - self.step
        seconds = _number(record.get("step_seconds"))
        if seconds is not None and math.isfinite(seconds):
            self.seconds += self._interval * seconds
        for name, kind in COUNTED.items():
            count = _number(record.get(name))
            if count is not None and count > self._counted.get(name, 0.0):
                self._event(Event(kind, step, step, int(min(count - self._counted.get(name, 0.0), 1e15))))
            self._counted[name] = count or 0.0
        self._counted["rewinds"] = rewinds
        if not math.isfinite(_number(record["loss"]) or 0.0):
            self._event(Event("not_finite", step, step, 1))
        self.step = step
        if _is_count(record.get("tokens")):
            self.tokens = record["tokens"]

    def _event(self, event: Event) -> None:
        last = self.events[-1] if self.events else None
        if last and last.kind == event.kind not in ("attempt", "changed") and last.last == self.step <= event.first:
            last.last, last.count = event.last, last.count + event.count
        elif len(self.events) < MOST_EVENTS:
            self.events.append(event)
        else:
            self.omitted_events += 1

    def _keep_samples(self, step: int, samples: list[Any]) -> None:
        """Of the first and of the last evaluation."""
        found = [
            {name: each[name] for name in ("prompt", "text")}
            for each in samples
            if isinstance(each, dict) and all(isinstance(each.get(name), str) for name in ("prompt", "text"))
        ]
        first = min(self.samples, default=step)
        self.samples = {at: texts for at, texts in self.samples.items() if at == first < step} | {step: found}

    def _add(self, record: Mapping[str, Any], step: int) -> None:
        layers: dict[str, dict[int, float]] = {}
        for name, given in record.items():
            value = _number(given)
            if value is None or name in COUNTERS:
                continue
            place = self._place(name)
            if place is not None:
                layers.setdefault(place[0], {})[place[1]] = value
            elif curve := self._curve(name):
                curve.add(step, value)
        for name, values in layers.items():
            if name not in self.maps and len(self.maps) >= MOST_MAPS:
                self.omitted_metrics += 1
                continue
            row = np.full(max(values) + 1, np.nan)
            row[list(values)] = list(values.values())
            row[~np.isfinite(row)] = np.nan
            self.maps.setdefault(name, LayerMap()).add(step, row)

    def _curve(self, name: str) -> Curve | None:
        if name not in self.curves:
            if len(self.curves) >= MOST_CURVES:
                self.omitted_metrics += 1
                return None
            self.curves[name] = Curve()
        return self.curves[name]

    def _place(self, name: str) -> tuple[str, int] | None:
        """The map and the row of a metric of one layer, None for any other."""
        if name in self._places:
            return self._places[name]
        match = _OF_LAYER.fullmatch(name)
        place = None
        if match and first_layer(match[1]) <= int(match[2]) < MOST_LAYERS:
            place = f"{match[1]}/{match[3]}", int(match[2]) - first_layer(match[1])
        if len(self._places) < MOST_LAYERS * MOST_MAPS:
            self._places[name] = place
        return place


def first_layer(name: str) -> int:
    """The index of the first row of a map: 0, the embedding, of `layer/...`, and 1 of the others."""
    return 0 if name.partition("/")[0] == "layer" else 1


def _line(file: BinaryIO) -> bytes:
    """The next line without more of it than could be a record; empty at the end and for a line that is not complete."""
    kept = line = file.readline(LONGEST_LINE)
    while line and not line.endswith(b"\n"):
        line, kept = file.readline(LONGEST_LINE), b"too long"
    return kept if line else b""


def _in_words(changes: Mapping[str, Any]) -> str:
    """`train.lr 0.004 -> 0.001, ...` of values before and after by key."""
    pairs = {name: values for name, values in changes.items() if isinstance(values, list) and len(values) == 2}
    return ", ".join(f"{name} {before} → {after}" for name, (before, after) in pairs.items())


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> float | None:
    """A number of a record, which may be one of the strings for those that JSON lacks; None for anything else."""
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    return _NOT_FINITE.get(value) if isinstance(value, str) else None
