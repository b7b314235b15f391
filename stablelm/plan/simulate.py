"""One step of a rank in a world of any size, in one process: a fake process group, fake tensors, the real engine.

What a run with hundreds of layers would take minutes to simulate is simulated with a few units of layers and extended.
That is exact where all layers are alike: each adds the same bytes to what rests, to what a forward pass keeps and to
what accumulates, and the peak lies in one of the phases recorded here, of which each shifts by a sum of these. Where a
unit holds dozens of thin layers, smaller units are simulated and the closed form gives what larger ones add.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from stablelm.config.engine_rules import SHARDED
from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.plan import estimate, memory
from stablelm.plan.memory_tracker import Ledger
from stablelm.plan.memory import Layout, Parameter
from stablelm.train.step import train_step

UNITS = 5
LAYERS = 6
MICRO_BATCHES = 2
LONGEST_WHOLE = 24
MOST_LAYERS = 30


@dataclass(frozen=True)
class Simulation:
    """What a step does on rank 0; bytes by kind."""

    peak: Counter[str]
    resting: Counter[str]
    gradients: int
    """Bytes of gradients before the update."""
    kept: int
    """Activations when the first loss is known, the gradients that the loss has taken by then among them."""
    operations: int
    """Operations that the host starts in a step for the device, but for those of the update."""
    simulated: Config
    """What was really run; `collectives` are its own."""
    collectives: Counter[str]
    collective_bytes: Counter[str]
    exact: bool
    """Whether all layers were simulated, or those left out are like the others."""


def simulate(
    config: Config, listed: list[Parameter], layout: Layout, *, nodes: int = 1, layers: int | None = None
) -> Simulation:
    """Simulates `layers` layers (None: as many as it takes) of a resolved config and extends them to all.

    Kinds single, fsdp2 and hsdp. Of many micro-batches two are simulated. No process group may exist.
    """
    assert layout.kind in ("single", *SHARDED), "DDP and DeepSpeed have no simulation"
    micro = memory.micro_batches(config, layout.world_size)
    few_micro = min(micro, MICRO_BATCHES)
    train = replace(config.train, global_batch_size=config.train.global_batch_size // micro * few_micro)
    few = replace(shortened(config, listed, layers), train=train)
    return _extended(_run(few, layout, nodes, few_micro), few, config, listed, layout)


def shortened(config: Config, listed: list[Parameter], layers: int | None) -> Config:
    """The config to simulate: as few layers, and if these are still many as small units, as show what repeats."""
    n_layers, prefetch = config.model.n_layers, config.engine.prefetch
    if layers is None and config.model.stream in ("concat", "dense"):
        layers = LONGEST_WHOLE
    if layers is not None:
        return _cut(config, layers)
    layer = sum(memory.GATHERED_BYTES * p.elements for p in listed if p.is_matrix and p.layer == n_layers - 1)
    together = -(-config.engine.unit_bytes // layer)
    units = UNITS + 2 * max(0, prefetch - 1)
    if together * units > MOST_LAYERS and n_layers > MOST_LAYERS:
        together = MOST_LAYERS // units
        small = replace(config.engine, unit_bytes=together * layer)
        config = replace(config, engine=small)
    last = n_layers % together
    return _cut(config, max(LAYERS, (units - (last > 0)) * together + last))


def _cut(config: Config, layers: int) -> Config:
    # Scales such as sqrt(1 - k / n_layers) want at least more than k layers.
    layers = max(layers, math.floor(config.model.deepscale.k) + 1)
    return replace(config, model=replace(config.model, n_layers=min(config.model.n_layers, layers)))


@dataclass
class _Recorded:
    """Peaks by (micro-batch, phase) and what was held when a micro-batch's loss was known."""

    ledger: Ledger
    phases: dict[tuple[int, str], Counter[str]]
    resting: Counter[str]
    kept: int
    layer: int
    operations: int
    """Of one layer in both passes of a micro-batch."""


class _Engine(TorchEngine):
    """The real engine, its tensors fake from the moment on at which they would take memory."""

    def __init__(self, config: Config, kind: str, ranks: Ranks, mode: FakeTensorMode):
        self.mode = mode
        self.ledger = Ledger()
        self.phases: dict[tuple[int, str], Counter[str]] = {}
        self.after_layer: list[int] = []
        self.started_by_layer: list[list[int]] = [[], []]
        """Operations so far after each layer's forward pass and, last layer first, before its backward pass."""
        self.kept = 0
        self._micro, self._phase = -1, "forward"
        super().__init__(config, kind, ranks)
        assert self.optimizer is not None
        # The fused kernel updates in place; its fake version would not.
        self.optimizer.step = lambda closure=None: None  # type: ignore[method-assign,assignment]
        layers = list(self.module.layers)
        for layer in layers:
            layer.register_forward_hook(self._layer_done)
        self._half = len(layers) - (len(layers) - 1) // 2

    def _materialise(self, config: Config, ranks: Ranks) -> None:
        with self.mode:
            self.module.to_empty(device=self.device)
        self._hold_parameters()

    def loss(self, tokens, targets, *, last: bool = True):
        self.ledger.backward = False
        self._micro += 1
        self._start("forward")
        sums = super().loss(tokens, targets, last=last)
        self.kept = self.kept or self.ledger.current["activations"]
        return sums

    def backward(self, loss, *, last: bool) -> None:
        self._end()
        self.ledger.backward = True
        self._start("later layers")
        super().backward(loss, last=last)
        self.ledger.book((p.grad for p in self.module.parameters() if p.grad is not None), "gradients")

    def step(self, lr: float, *, largest_norm: float = math.inf):
        self._end()
        self._start("update")
        self._end()
        # DTensor works out the shapes of the norms on whole fake gradients; the real ones take a number each.
        self.ledger.follows = False
        return super().step(lr, largest_norm=largest_norm)

    def _layer_done(self, module: Any, inputs: Any, output: Any) -> None:
        held = self.ledger.current
        self.after_layer.append(held["activations"] + held["weight_copies"])
        self.started_by_layer[0].append(self.ledger.operations)
        output[0].register_hook(self._reached)

    def _reached(self, gradient: Any) -> None:
        """The gradient of a layer's output is known: its backward pass begins."""
        before = self.started_by_layer[1]
        before.append(self.ledger.operations)
        if len(before) - self._micro * len(self.module.layers) == self._half:
            self._end()
            self._start("earlier layers")

    def _start(self, phase: str) -> None:
        self._phase = phase
        self.ledger.start_peak()

    def _end(self) -> None:
        self.phases[max(self._micro, 0), self._phase] = +self.ledger.peak


def _run(config: Config, layout: Layout, nodes: int, micro: int) -> _Recorded:
    rows = micro * (config.train.micro_batch_size or 1)
    with _fake_ranks(layout, nodes) as ranks:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        engine = _Engine(config, layout.kind, ranks, mode)
        ledger = engine.ledger
        ledger.book(engine.module.parameters(), "weights")
        ledger.book(engine.module.buffers(), "buffers")
        states = engine.optimizer.state.values() if engine.optimizer else ()
        ledger.book((state[name] for state in states for name in ("exp_avg", "exp_avg_sq")), "moments")
        with mode:
            tokens, targets = (torch.zeros(rows, config.data.seq_len, dtype=torch.int64) for _ in range(2))
            ledger.book((tokens, targets), "inputs")
            resting = +ledger.current
            with ledger:
                train_step(
                    engine, ranks, tokens, targets, step=1, lr=0.0, seed=0, micro=config.train.micro_batch_size or 1
                )
        # The last layer is like the one before it, and neither is the first.
        steps = engine.after_layer
        layer = steps[-1] - steps[-2] if len(steps) > 1 else 0
        return _Recorded(ledger, engine.phases, resting, engine.kept, layer, _operations(engine, config.model.n_layers))


def _operations(engine: _Engine, depth: int) -> int:
    """Operations of a layer in both passes, the mean over those between the first and the last."""
    passes = [counts[:depth] for counts in engine.started_by_layer]
    return sum((counts[-1] - counts[0]) // (depth - 1) for counts in passes) if depth > 1 else 0


def _extended(recorded: _Recorded, few: Config, config: Config, listed: list[Parameter], layout: Layout) -> Simulation:
    """What was recorded of `few`, with the layers that it lacks of `config`."""
    missing = config.model.n_layers - few.model.n_layers
    more = Counter() if missing == 0 else _difference(few, config, layout)
    kept = Counter(activations=missing * recorded.layer - more["weight_copies"], weight_copies=more["weight_copies"])
    rest = Counter({kind: more[kind] for kind in ("weights", "moments")})
    last = max(index for index, _ in recorded.phases)
    peaks = []
    for (index, phase), peak in recorded.phases.items():
        held = rest + kept if phase in ("forward", "later layers") else rest
        if phase == "update" or (phase == "earlier layers" and index == last):
            held = held + Counter(gradients=more["gradients"])
        elif index > 0 or phase == "earlier layers":
            held = held + Counter(gradients=more["accumulated"])
        peaks.append(peak + held)
    peak = max(peaks, key=Counter.total)
    whole_units = few.engine.unit_bytes == config.engine.unit_bytes
    if not whole_units:
        peak.update(estimate.peak(config, listed, layout))
        peak.subtract(estimate.peak(replace(config, engine=few.engine), listed, layout))
    ledger = recorded.ledger
    alike = config.model.stream not in ("concat", "dense") and whole_units
    micro = last + 1
    operations = ledger.operations + missing * recorded.operations * micro
    operations = operations * memory.micro_batches(config, layout.world_size) // micro
    return Simulation(
        peak=peak,
        resting=recorded.resting + rest,
        gradients=recorded.phases[last, "update"]["gradients"] + more["gradients"],
        kept=recorded.kept + kept["activations"],
        operations=operations,
        simulated=few,
        collectives=+ledger.collectives,
        collective_bytes=+ledger.collective_bytes,
        exact=missing == 0 or alike,
    )


def _difference(few: Config, config: Config, layout: Layout) -> Counter[str]:
    """Bytes that the missing layers add to what rests, by the closed forms."""
    total: Counter[str] = Counter()
    for sign, part in ((1, config), (-1, few)):
        listed = memory.parameters(part)
        found = memory.resting(part, listed, layout)
        found["accumulated"] = memory.accumulated(part, listed, layout)
        found["weight_copies"] = memory.weight_copies(part, listed, layout)
        total.update({kind: sign * size for kind, size in found.items()})
    return total


@contextmanager
def _fake_ranks(layout: Layout, nodes: int) -> Iterator[Ranks]:
    """Rank 0 of a world whose other ranks are never asked."""
    device = torch.device("cpu")
    if layout.world_size == 1 or layout.kind == "single":
        yield Ranks(0, 1, device, None, None)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        yield Ranks(0, layout.world_size, device, None, None, nodes=nodes)
    finally:
        dist.destroy_process_group()
