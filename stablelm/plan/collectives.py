"""Collectives of one optimizer step on one rank, in closed form: how many, and bytes of the whole tensors they move."""

from collections import Counter
from dataclasses import dataclass, field

from stablelm.config.engine_rules import SHARDED
from stablelm.config.schema import Config
from stablelm.methods.sizes import d_key_value, widths
from stablelm.plan.memory import (
    DDP_BUCKET_BYTES,
    DDP_FIRST_BUCKET_BYTES,
    Layout,
    Parameter,
    gathered_width,
    group_units,
    micro_batches,
    padded,
    width,
)

VALID_BYTES = 8  # the count of valid targets, which all ranks agree on


@dataclass
class Collectives:
    """By kind: a gather's bytes are those it makes, a reduction's those it takes, on each rank.

    `replicas` are those among the copies of the model, for time's sake; they count in `counts` and `bytes` too.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    replicas: int = 0

    def add(self, kind: str, count: int, size: int) -> None:
        self.counts[kind] += count
        self.bytes[kind] += size


def collectives(config: Config, listed: list[Parameter], layout: Layout) -> Collectives:
    """Those of a step, with one all-reduce for the count of valid targets before it."""
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
    """Units are gathered for both passes of each micro-batch, the root once a step; all are reduced in the last one."""
    micro, size = micro_batches(config, layout.world_size), width(config)
    *layers, root = ([sum(padded(p, layout.shards) for p in unit)] for unit in group_units(config, listed))
    units = [elements for (elements,) in layers]
    found.add("all_gather", 2 * micro * len(units), 2 * micro * sum(units) * gathered_width(config))
    found.add("all_gather", 1, root[0] * size)
    whole = (sum(units) + root[0]) * size
    found.add("reduce_scatter", len(units) + 1, whole)
    if layout.kind == "hsdp":
        found.add("all_reduce", len(units) + 1, whole // layout.shards)
        found.replicas = whole // layout.shards
    vectors = [parameter.elements for parameter in listed if not parameter.is_matrix]
    if vectors:
        found.add("all_reduce", 1, sum(vectors) * size)
    found.add("all_reduce", 1, 8)  # the squared norm of this copy, in fp64
    sigma = sigma_elements(config)
    if sigma:
        found.add("all_reduce", 1, sigma * size)


def sigma_elements(config: Config) -> int:
    """Elements of the vectors of all spectral norms, which a refresh on split matrices sums over ranks."""
    model = config.model
    if model.reparam != "sigma":
        return 0
    inner, d_kv, total = model.axes.maps.rank(model), d_key_value(model), 0
    for layer in range(model.n_layers):
        attention, feedforward = widths(model, 2 * layer), widths(model, 2 * layer + 1)
        for d_out in (attention.attention, d_kv, d_kv):
            total += attention.read + d_out + (2 * inner if inner else 0)
        total += attention.attention + attention.branch
        if model.axes.reparam.applies(model, 1):
            assert model.d_ff is not None
            firsts = 2 if model.activation == "swiglu" else 1
            total += firsts * (feedforward.read + model.d_ff) + model.d_ff + feedforward.branch
    return total


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
    found.add("all_gather", gathers * buckets, gathers * elements * size)
    found.add("all_reduce", 1, size)
