"""One step of a rank in a world of any size, in one process: a fake process group, fake tensors, the real engine.

What a run with hundreds of layers would take minutes to simulate is simulated with a few units of layers and extended.
That is exact where all layers are alike: each adds the same bytes to what rests, to what a forward pass keeps and to
what accumulates, and the peak lies in one of the phases recorded here, of which each shifts by a sum of these. Where a
unit holds dozens of thin layers, smaller units are simulated and the estimate gives what larger ones add.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from stablelm.config.engine_rules import SHARDED
from stablelm.config.schema import Config
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.engine.peak_memory.rank_memory import Layout, Parameter
from stablelm.model.memory import layer_memory
from stablelm.plan.fake_engine import FakeEngine, fake_ranks
from stablelm.train.step import train_step

UNITS = 5
LAYERS = 6
MICRO_BATCHES = 2
DIFFERENT_LAYERS = 24
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
    micro = rank_memory.micro_batches(config, layout.world_size)
    few_micro = min(micro, MICRO_BATCHES)
    train = replace(config.train, global_batch_size=config.train.batch_sizes.largest // micro * few_micro)
    few = replace(shortened(config, listed, layers), train=train)
    return _extended(_run(few, layout, nodes, few_micro), few, config, listed, layout)


def on_other_ranks(
    found: Simulation, before: tuple[Config, Layout], config: Config, listed: list[Parameter], layout: Layout
) -> Simulation | None:
    """The simulation of `before` on another number of ranks: what changes of the estimate changes of it.

    Ranks change the sizes of shards and their padding, but not what a step does, if engine, micro-batch and whether
    there are several micro-batches stay. None if they do not, or if the estimate's peak is at another point of the
    step: then only a simulation of its own can tell.
    """
    config_before, layout_before = before
    if _step(config, layout) != _step(*before):
        return None
    there, here = (estimate.peak(c, listed, at) for c, at in ((config, layout), before))
    if set(+there) != set(+here):
        return None
    change, held = Counter(there), rank_memory.resting(config, listed, layout)
    change.subtract(here)
    held.subtract(rank_memory.resting(config_before, listed, layout_before))
    micro, micro_before = (rank_memory.micro_batches(c, at.world_size) for c, at in ((config, layout), before))
    return replace(
        found,
        peak=Counter({kind: found.peak[kind] + change[kind] for kind in change.keys() | found.peak.keys()}),
        resting=Counter({kind: size + held[kind] for kind, size in found.resting.items()}),
        gradients=found.gradients + held["gradients"],
        operations=found.operations * micro // micro_before,
        exact=False,
    )


def _step(config: Config, layout: Layout) -> tuple[str, int | None, int]:
    """What decides which operations a step repeats."""
    micro = min(rank_memory.micro_batches(config, layout.world_size), MICRO_BATCHES)
    return layout.kind, config.train.micro_batch_size, micro


def shortened(config: Config, listed: list[Parameter], layers: int | None) -> Config:
    """The config to simulate: as few layers, and if these are still many as small units, as show what repeats."""
    n_layers, prefetch = config.model.n_layers, config.engine.prefetch
    if layers is None and config.model.axes.stack.shared:
        layers = n_layers  # the gradient of a shared layer is complete at its first place
    if layers is None and not layer_memory.measure(config).alike:
        layers = DIFFERENT_LAYERS
    if layers is not None:
        return _cut(config, layers)
    layer = sum(rank_memory.GATHERED_BYTES * p.elements for p in listed if p.is_matrix and p.layer == n_layers - 1)
    in_unit = -(-config.engine.unit_bytes // layer)
    units = UNITS + 2 * max(0, prefetch - 1)
    if in_unit * units > MOST_LAYERS and n_layers > MOST_LAYERS:
        in_unit = MOST_LAYERS // units
        small = replace(config.engine, unit_bytes=in_unit * layer)
        config = replace(config, engine=small)
    last = n_layers % in_unit
    return _cut(config, max(LAYERS, (units - (last > 0)) * in_unit + last))


def _cut(config: Config, layers: int) -> Config:
    return replace(config, model=layer_memory.with_layers(config.model, layers))


def _run(config: Config, layout: Layout, nodes: int, micro: int) -> tuple[FakeEngine, Counter[str]]:
    """The engine after one step of `micro` micro-batches, and what it held before it."""
    rows = micro * (config.train.micro_batch_size or 1)
    with fake_ranks(layout, nodes) as ranks:
        engine = FakeEngine(config, layout.kind, ranks)
        with engine.mode:
            tokens, targets = (torch.zeros(rows, config.data.seq_len, dtype=torch.int64) for _ in range(2))
            engine.tracker.assign((tokens, targets), "inputs")
            resting = +engine.tracker.current
            with engine.tracker:
                train_step(
                    engine, ranks, tokens, targets, step=1, lr=0.0, seed=0, micro=config.train.micro_batch_size or 1
                )
        return engine, resting


def _operations_of_a_layer(engine: FakeEngine, depth: int) -> int:
    """Operations of a layer in both passes of a micro-batch, the mean over those between the first and the last."""
    passes = [counts[:depth] for counts in engine.operations_by_layer]
    return sum((counts[-1] - counts[0]) // (depth - 1) for counts in passes) if depth > 1 else 0


def _extended(
    recorded: tuple[FakeEngine, Counter[str]], few: Config, config: Config, listed: list[Parameter], layout: Layout
) -> Simulation:
    """What was recorded of `few`, with the layers that it lacks of `config`."""
    engine, resting = recorded
    missing = config.model.n_layers - few.model.n_layers
    more = Counter() if missing == 0 else _difference(few, config, layout)
    kept = Counter({kind: more[kind] for kind in ("activations", "weight_copies")})
    rest = Counter({kind: more[kind] for kind in ("weights", "moments")})
    last = max(index for index, _ in engine.phases)
    logits, _ = layer_memory.loss(config, layout.device)
    logits.subtract(layer_memory.loss(config)[0])  # the fake engine's device is the CPU
    peaks = []
    for (index, phase), peak in engine.phases.items():
        held = rest + kept if phase in ("forward", "later layers") else rest
        if phase == "forward":
            held = held + logits
        if phase == "update" or (phase == "earlier layers" and index == last):
            held = held + Counter(gradients=more["gradients"])
        elif index > 0 or phase == "earlier layers":
            held = held + Counter(gradients=more["accumulated"])
        if phase in ("later layers", "earlier layers"):
            held = held + Counter(temporary=more["temporary"])
        peaks.append(peak + held)
    peak = max(peaks, key=Counter.total)
    whole_units = few.engine.unit_bytes == config.engine.unit_bytes
    if not whole_units:
        peak.update(estimate.peak(config, listed, layout))
        peak.subtract(estimate.peak(replace(config, engine=few.engine), listed, layout))
    micro = last + 1
    operations = engine.tracker.operations + missing * _operations_of_a_layer(engine, few.model.n_layers) * micro
    operations = operations * rank_memory.micro_batches(config, layout.world_size) // micro
    return Simulation(
        peak=peak,
        resting=resting + rest,
        gradients=engine.phases[last, "update"]["gradients"] + more["gradients"],
        kept=engine.kept + more["activations"],
        operations=operations,
        simulated=few,
        collectives=+engine.tracker.collectives,
        collective_bytes=+engine.tracker.collective_bytes,
        exact=missing == 0 or (whole_units and layer_memory.measure(config).alike),
    )


def _difference(few: Config, config: Config, layout: Layout) -> Counter[str]:
    """Bytes that the missing layers add to what rests, accumulates, is kept and is temporary."""
    total: Counter[str] = Counter()
    for sign, part in ((1, config), (-1, few)):
        listed, layers = rank_memory.parameters(part), layer_memory.measure(part)
        found = rank_memory.resting(part, listed, layout)
        found["accumulated"] = rank_memory.accumulated(part, listed, layout)
        found["activations"], found["temporary"] = layers.kept, layers.temporary
        found["weight_copies"] = layers.weight_copies(sharded=layout.kind in SHARDED)
        total.update({kind: sign * size for kind, size in found.items()})
    return total
