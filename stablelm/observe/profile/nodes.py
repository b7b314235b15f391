"""The events of a Chrome trace as nested nodes of the host's threads, each with its part of the step.

What runs inside a mark belongs to its part; a backward pass belongs to the part of the forward operator that it is of,
which the profiler links.
"""

from dataclasses import dataclass, field
from typing import Any

from stablelm.observe.profile import parts
from stablelm.observe.profile.parts import MARK, STEP

HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
COMMUNICATION = ("gloo:", "nccl:", "c10d::", "FSDP::", "record_param_comms")
COMPILED = ("Torch-Compiled Region", "CompiledFunction")
BACKWARD = "autograd::engine::evaluate_function: "
PYTHON = "(Python and autograd)"
"""In place of an operator: the time between operators."""
FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Matmuls, and which of their inputs is the first factor."""


@dataclass
class Node:
    """An event of a thread of the host, in microseconds; `stop` is not after its parent's."""

    name: str
    category: str
    thread: int
    start: float
    stop: float
    arguments: dict[str, Any]
    parent: "Node | None"
    children: "list[Node]" = field(default_factory=list)
    part: str = parts.OTHER

    @property
    def operator(self) -> str:
        """The operator that it is or runs for."""
        if self.category == "cpu_op" and not self.name.startswith(BACKWARD):
            return self.name
        return self.parent.operator if self.category.startswith("cuda") and self.parent is not None else PYTHON

    @property
    def matmul(self) -> "Node | None":
        """The outermost matmul that it is or runs for."""
        above = self.parent.matmul if self.parent is not None else None
        return above or (self if self.name in FACTORS else None)

    @property
    def flops(self) -> float:
        """2 m n k of a matmul, from the shapes of its factors; 0 where the trace has none."""
        shapes, first = self.arguments.get("Input Dims", []), FACTORS[self.name]
        if len(shapes) < first + 2:
            return 0.0
        *batch, rows, inner = shapes[first]
        return 2.0 * (batch[0] if batch else 1) * rows * inner * shapes[first + 1][-1]


def read_nodes(events: list[dict[str, Any]]) -> list[Node]:
    """Of `traceEvents`, in the order of time, with their parts."""
    nodes = _nested(events)
    links = [event for event in events if event.get("cat") == "fwdbwd"]
    forward = {(event["tid"], event["ts"]): event["id"] for event in links if event["ph"] == "s"}
    backward = {(event["tid"], event["ts"]): event["id"] for event in links if event["ph"] == "f"}
    # A link ends at the function inside the event that evaluates it, which has the same number.
    numbers = {_number(node): link for node in nodes if (link := backward.get((node.thread, node.start))) is not None}
    found: dict[int, str] = {}
    latest: dict[int, str] = {}
    for node in nodes:
        inherited = node.parent.part if node.parent is not None else parts.OTHER
        node.part = _named(node) or inherited
        if node.name.startswith(BACKWARD) and node.part != parts.COMPILED:
            link = numbers.get(_number(node))
            # Gradients are added up right after the function that makes them.
            node.part = latest.get(node.thread, inherited) if link is None else found.get(link, inherited)
        if node.name.startswith(BACKWARD):
            latest[node.thread] = node.part
        if (link := forward.get((node.thread, node.start))) is not None:
            found[link] = node.part
    return nodes


def _nested(events: list[dict[str, Any]]) -> list[Node]:
    spans = (event for event in events if event.get("ph") == "X" and event.get("cat") in HOST)
    nodes: list[Node] = []
    open_: dict[int, Node | None] = {}
    for event in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
        start, stop, thread = event["ts"], event["ts"] + event["dur"], event["tid"]
        parent = open_.get(thread)
        while parent is not None and parent.stop <= start:
            parent = parent.parent
        if parent is not None:
            stop = min(stop, parent.stop)
        node = Node(event["name"], event["cat"], thread, start, stop, event.get("args", {}), parent)
        if parent is not None:
            parent.children.append(node)
        nodes.append(node)
        open_[thread] = node
    return nodes


def _named(node: Node) -> str:
    """The part that a node's own name says, '' for most."""
    if node.name.startswith(MARK):
        return parts.OTHER if node.name == MARK + STEP else node.name.removeprefix(MARK)
    if node.name.startswith(COMMUNICATION):
        return parts.COMMUNICATION
    return parts.COMPILED if node.name.removeprefix(BACKWARD).startswith(COMPILED) else ""


def _number(node: Node) -> tuple[int, Any, Any]:
    return node.thread, node.arguments.get("Sequence number"), node.arguments.get("Fwd thread id")
