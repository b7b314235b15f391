"""Where the time of traced steps goes: stretches that cover them without gaps or overlaps.

On a CPU they are of the thread that trains, on a GPU of the device. Time in which that thread only waits while ranks
exchange data is communication; on a GPU an exchange counts where nothing else runs beside it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stablelm.observe.profile import parts
from stablelm.observe.profile.nodes import PYTHON, Node, read_nodes
from stablelm.observe.profile.parts import MARK, STEP

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
EXCHANGES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
Span = tuple[float, float]


class Stretch(NamedTuple):
    """Some time of a step, in microseconds of the trace's clock."""

    start: float
    stop: float
    part: str
    operator: str


@dataclass
class Timeline:
    """`steps`: start and stop of each; `calls` of each operator, `flops` and microseconds of all matmuls in them."""

    steps: list[Span]
    stretches: list[Stretch]
    calls: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    matmul_time: float = 0.0


def read(events: list[dict[str, Any]], steps: int) -> Timeline:
    """Of the `traceEvents` of a trace whose steps are marked, of which the first `steps` are whole."""
    nodes = read_nodes(events)
    marks = [node for node in nodes if node.name == MARK + STEP][:steps]
    inside = [node for mark in marks for node in _below(mark)]
    host = [Stretch(*gap, node.part, node.operator) for node in inside for gap in _own_time(node)]
    found = Timeline([(mark.start, mark.stop) for mark in marks], host)
    kernels = [event for event in events if event.get("ph") == "X" and event.get("cat") in DEVICE]
    if kernels:
        _take_device(found, nodes, kernels)
    else:
        away = [node for node in nodes if node.thread != marks[0].thread and node.name.startswith(EXCHANGES)]
        exchanges = _merged([(node.start, node.stop) for node in away])
        found.stretches = [piece for each in sorted(host) for piece in _with_waits(each, exchanges)]
        for node in inside:
            found.calls[node.operator] += node.category == "cpu_op"
            if node.matmul is node:
                found.flops += node.flops
                found.matmul_time += node.stop - node.start
    _mark_between(found, inside)
    return found


def _below(node: Node) -> Iterator[Node]:
    """The node and all that runs inside it."""
    stack = [node]
    while stack:
        found = stack.pop()
        yield found
        stack += found.children


def _own_time(node: Node) -> Iterator[Span]:
    """The time of a node that is not of its children."""
    cursor = node.start
    for child in node.children:
        if child.start > cursor:
            yield cursor, child.start
        cursor = child.stop
    if node.stop > cursor:
        yield cursor, node.stop


def _merged(spans: list[Span]) -> list[Span]:
    """Their union, in order."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def _with_waits(stretch: Stretch, exchanges: list[Span]) -> Iterator[Stretch]:
    """A stretch of the host, cut where an exchange was under way on another thread and no operator here."""
    if stretch.operator != PYTHON or stretch.part == parts.COMMUNICATION:
        yield stretch
        return
    cursor = stretch.start
    for start, stop in _overlaps(exchanges, stretch.start, stretch.stop):
        if start > cursor:
            yield stretch._replace(start=cursor, stop=start)
        yield Stretch(start, stop, parts.COMMUNICATION, PYTHON)
        cursor = stop
    if stretch.stop > cursor:
        yield stretch._replace(start=cursor)


def _overlaps(spans: list[Span], start: float, stop: float) -> Iterator[Span]:
    """What of ordered spans lies between `start` and `stop`."""
    at = max(0, bisect_right(spans, (start, start)) - 1)
    while at < len(spans) and spans[at][0] < stop:
        if spans[at][1] > start:
            yield max(start, spans[at][0]), min(stop, spans[at][1])
        at += 1


def _take_device(found: Timeline, nodes: list[Node], kernels: list[dict[str, Any]]) -> None:
    """Puts the device's stretches in place of the host's."""
    calls = [node for node in nodes if node.category.startswith("cuda")]
    launched = {node.arguments.get("correlation"): node for node in calls}
    host, found.stretches = sorted(found.stretches), []
    pieces: list[tuple[bool, Stretch]] = []
    matmuls: set[int] = set()
    for event in kernels:
        node = launched.get(event.get("args", {}).get("correlation"))
        exchange = event["name"].startswith(EXCHANGES)
        part = parts.COMMUNICATION if exchange else node.part if node else parts.OTHER
        operator = node.operator if node else event["name"]
        pieces.append((exchange, Stretch(event["ts"], event["ts"] + event["dur"], part, operator)))
        inside = any(start <= event["ts"] < stop for start, stop in found.steps)
        if inside and not exchange:
            found.calls[operator] += 1
        if inside and node is not None and (matmul := node.matmul) is not None:
            found.matmul_time += event["dur"]
            found.flops += matmul.flops if id(matmul) not in matmuls else 0
            matmuls.add(id(matmul))
    pieces.sort()
    for start, stop in found.steps:
        found.stretches += _covering(start, stop, pieces, host)


def _covering(start: float, stop: float, pieces: list[tuple[bool, Stretch]], host: list[Stretch]) -> list[Stretch]:
    """One step of the device: what ran in it, each moment once, and what the host did while nothing ran."""
    found: list[Stretch] = []
    for exchange in (False, True):  # an exchange counts where no work runs beside it
        taken = _merged([(each.start, each.stop) for each in found])
        cursor = start
        for _, piece in (piece for piece in pieces if piece[0] == exchange):
            first, last = max(cursor, piece.start), min(stop, piece.stop)
            if last > first:
                found += [piece._replace(start=a, stop=b) for a, b in _free(taken, first, last)]
                cursor = last
    taken = _merged([(each.start, each.stop) for each in found])
    idle = list(_free(taken, start, stop))
    waits = _merged([(each.start, each.stop) for each in host if each.part == parts.WAIT])
    for first, last in idle:
        data = list(_overlaps(waits, first, last))
        found += [Stretch(a, b, parts.WAIT, PYTHON) for a, b in data]
        found += [Stretch(a, b, parts.IDLE, PYTHON) for a, b in _free(data, first, last)]
    return found


def _free(taken: list[Span], start: float, stop: float) -> Iterator[Span]:
    """What of [start, stop) lies in none of the ordered spans."""
    cursor = start
    for first, last in _overlaps(taken, start, stop):
        if first > cursor:
            yield cursor, first
        cursor = last
    if stop > cursor:
        yield cursor, stop


def _mark_between(found: Timeline, inside: list[Node]) -> None:
    """What comes before a step fetches its data is the end of the step before: records, evaluation, saving."""
    fetches = sorted(node.start for node in inside if node.name == MARK + parts.WAIT)
    for start, stop in found.steps:
        first = next((fetch for fetch in fetches if start <= fetch < stop), start)
        found.stretches = [
            each._replace(part=parts.BETWEEN) if start <= each.start and each.stop <= first else each
            for each in found.stretches
        ]
