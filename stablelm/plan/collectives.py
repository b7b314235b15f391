"""Collectives of one optimizer step on one rank: how many, and the bytes of the full tensors they move.

Those of weights and gradients follow from the parameters and the engine's units, those of the update are measured.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from stablelm.config.engine_rules import SHARDED
from stablelm.config.schema import Config
from stablelm.engine.peak_memory.rank_memory import (
    DDP_BUCKET_BYTES,
    DDP_FIRST_BUCKET_BYTES,
    Layout,
    Parameter,
    ends,
    gathered_width,
    group_units,
    micro_batches,
    padded,
    width,
)
from stablelm.engine.updates import owners
from stablelm.model.memory.layer_memory import extended, with_layers
from stablelm.optimizers import catalogue
from stablelm.plan.fake_engine import FakeEngine, fake_ranks

UPDATED_LAYERS = 2
VALID_BYTES = 8  # the count of valid targets, which all ranks agree on


@dataclass
class Collectives:
    """Counts and bytes by kind on each rank: the output of a gather, the input of a reduction.

    `replicas`: bytes reduced between copies of the model, which take another network; included in `bytes`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    replicas: int = 0

    def add(self, kind: str, count: int, size: int) -> None:
        self.counts[kind] += count
        self.bytes[kind] += size


def collectives(config: Config, listed: list[Parameter], layout: Layout) -> Collectives:
    """The collectives of a step, including the all-reduce of the count of valid targets."""
    found = Collectives()
    if layout.world_size == 1:
        return found
    found.add("all_reduce", 1, VALID_BYTES)
    if layout.kind in SHARDED:
        _sharded(config, listed, layout, found)
    elif layout.kind == "ddp":
        buckets = ddp_buckets([parameter.elements * width(config) for parameter in listed])
        found.add("all_reduce", len(buckets), sum(buckets))
    else:
        _zero(config, listed, layout, found)
    return found


def _sharded(config: Config, listed: list[Parameter], layout: Layout, found: Collectives) -> None:
    """What `engine.reshard_after_forward` has gathered again, and `engine.accumulate` reduced, for each micro-batch."""
    micro, size, freed = micro_batches(config, layout.world_size), width(config), config.engine.reshard_after_forward
    *units, root = group_units(config, listed)
    embeddings, *others = ends(root)
    elements = {id(unit): sum(padded(p, layout.shards) for p in unit) for unit in (*units, embeddings, *others)}

    places = Counter(config.model.axes.stack.places(config.model))

    def gather(unit: list[Parameter], times: int, bytes_each: int) -> None:
        found.add("all_gather", times, times * elements[id(unit)] * bytes_each)

    for unit in units:
        gather(unit, 1 if freed == "never" else 2 * micro * _runs(unit, places), gathered_width(config))
    for unit in filter(None, (embeddings, *others)):
        again = 2 * micro if freed == "always" else 1
        gather(unit, (1 if freed == "never" else micro) if unit is embeddings else again, size)
    summed = 2 if config.engine.reduce_dtype == "bf16" else size
    times = micro if config.engine.accumulate == "sharded" or summed < size else 1
    # What a shared layer accumulated goes with the backward pass of its last place, its own gradient with the first's.
    twice = times == 1 and micro > 1
    parts = [(elements[id(unit)], summed) for unit in units for _ in range(min(1 + twice, _runs(unit, places)))]
    parts += [(elements[id(unit)], size) for unit in filter(None, (embeddings, *others))]
    whole = sum(count * width for count, width in parts)
    found.add("reduce_scatter", times * len(parts), times * whole)
    if layout.kind == "hsdp":
        copies = times if summed < size else 1
        found.add("all_reduce", copies * len(parts), copies * whole // layout.shards)
        found.replicas = copies * whole // layout.shards
    vectors = [parameter.elements for parameter in listed if not parameter.is_matrix]
    if vectors:
        found.add("all_reduce", 1, sum(vectors) * size)
    for kind, (count, moved) in _update(config, layout).items():
        found.add(kind, count, moved)
    hidden = [(parameter.shape[0], parameter.shape[1]) for parameter in listed if parameter.hidden]
    if catalogue.update_name(config.train) == "muon":
        # Matrices go to their owners and come back.
        whole = sum(rows * columns for rows, columns in hidden) * size
        found.add("all_to_all", 2 * len(owners.buckets(hidden, layout.shards)), 2 * whole // layout.shards)


def _runs(unit: list[Parameter], places: Counter[int]) -> int:
    """How often a unit of layers runs in a pass; units of several layers run once."""
    layer = unit[0].layer
    return 1 if layer is None else places[layer]


def _update(config: Config, layout: Layout) -> dict[str, tuple[int, int]]:
    """(count, bytes) by kind of the collectives of the update: the norm of the gradients, what a method then renews.

    Measured on few layers of the real engine. Summed over layers whose widths grow evenly they are a polynomial of the
    second degree in the depth, which three depths determine.
    """
    stack = config.model.axes.stack
    model = replace(stack.unshared(config.model), n_layers=stack.distinct(config.model))
    config = replace(config, model=model)
    first = with_layers(config.model, UPDATED_LAYERS).n_layers
    depths = [first, first + 1, first + 2] if config.model.n_layers > first + 2 else [config.model.n_layers]
    found = [_update_of(replace(config, model=replace(config.model, n_layers=depth)), layout) for depth in depths]
    depth = config.model.n_layers
    return {
        kind: tuple(extended(depth, depths, [each[kind][place] for each in found]) for place in (0, 1))
        for kind in found[0]
    }  # type: ignore[return-value]


def _update_of(config: Config, layout: Layout) -> dict[str, tuple[int, int]]:
    config = replace(config, engine=replace(config.engine, replicas=layout.replicas if layout.kind == "hsdp" else None))
    with fake_ranks(layout, 1) as ranks:
        engine = FakeEngine(config, layout.kind, ranks)
        with engine.mode:
            for parameter in engine.module.parameters():
                parameter.grad = torch.empty_like(parameter)
            with engine.tracker:
                engine.step(0.0)
    counts, sizes = engine.tracker.collectives, engine.tracker.collective_bytes
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def ddp_buckets(sizes: list[int]) -> list[int]:
    """Bytes of DDP's buckets: parameters last to first, the first bucket closed at 1 MiB, the others at 25 MiB."""
    found, limit, current = [], DDP_FIRST_BUCKET_BYTES, 0
    for size in reversed(sizes):
        current += size
        if current >= limit:
            found.append(current)
            current, limit = 0, DDP_BUCKET_BYTES
    return found + [current] * (current > 0)


def _zero(config: Config, listed: list[Parameter], layout: Layout, found: Collectives) -> None:
    """Gradients once to their owners in buckets of a unit's elements; weights back once, under zero3 for each pass.

    Counts are those of full buckets (Rajbhandari et al. 2020, section 7: 2 and 3 times the parameters).
    """
    size, micro = width(config), micro_batches(config, layout.world_size)
    elements = sum(parameter.elements for parameter in listed)
    bucket = max(2, config.engine.unit_bytes // 4 * 2)
    buckets = -(-elements // bucket)
    reductions = 1 if layout.kind == "zero1" else micro
    found.add("reduce_scatter", reductions * buckets, reductions * elements * size)
    gathers = 2 * micro if layout.kind == "zero3" else 1
    places = Counter(config.model.axes.stack.places(config.model)) if layout.kind == "zero3" else Counter()
    gathered = sum(p.elements * (1 if p.layer is None else max(1, places[p.layer])) for p in listed)
    found.add("all_gather", gathers * -(-gathered // bucket), gathers * gathered * size)
    found.add("all_reduce", 1, size)
