"""What would make a plan fit: the first of a list of changes whose estimated peak memory does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stablelm.config import engine_rules
from stablelm.config.engine_rules import SHARDED, ZERO
from stablelm.config.schema import Config, EngineConfig
from stablelm.engine.peak_memory import estimate
from stablelm.engine.peak_memory.rank_memory import Layout, Parameter

MOST_RANKS = 4096
SMALL_UNIT = 2**24
OFFLOADS = {"zero1": "optimizer", "zero2": "optimizer", "zero3": "parameters"} | dict.fromkeys(SHARDED, "parameters")


@dataclass(frozen=True)
class Remedy:
    """Changed keys as arguments, the number of ranks, and the peak bytes per GPU with them."""

    arguments: tuple[str, ...]
    world_size: int
    peak: int


def first_that_fits(
    config: Config,
    listed: list[Parameter],
    world_size: int,
    limit: float,
    scale: float,
    layout_of: Callable[[Config, int], Layout],
) -> Remedy | None:
    """The first combination whose peak, times `scale` (simulated over estimated), is at most `limit` bytes.

    At the given number of ranks, then at twice, four times, ... as many: the settings as they are; recompute, with
    smaller and smaller micro-batches, or a single one, so that no unreduced gradients accumulate; that with fsdp2 in
    place of an engine that shards less, and small units; with zero3, which reduces gradients after each micro-batch;
    with offload. The global batch stays the same; None if nothing fits. `config.engine.kind` is concrete.
    """
    ranks = world_size
    while ranks <= MOST_RANKS:
        for changed in _changes(config, ranks):
            if _legal(changed, ranks):
                needed = round(scale * estimate.peak(changed, listed, layout_of(changed, ranks)).total())
                if needed <= limit:
                    return Remedy(_arguments(config, changed), ranks, needed)
        ranks *= 2
    return None


def _changes(config: Config, ranks: int) -> Iterator[Config]:
    rows = config.train.batch_sizes.largest // ranks
    micro = min(config.train.micro_batch_size or rows, rows)
    sizes = [size for size in range(micro, 0, -1) if rows % size == 0]
    engine = config.engine
    if ranks > 1 and engine.kind == "single":
        engine = replace(engine, kind="fsdp2")
    sharded = engine if engine.kind in (*SHARDED, "zero3") else replace(engine, kind="fsdp2")
    small = replace(sharded, recompute="full", unit_bytes=min(engine.unit_bytes, SMALL_UNIT))
    yield _with(config, engine, micro)
    tried = [replace(engine, recompute="full"), small]
    if ranks > 1:
        tried.append(replace(sharded, recompute="full", kind="zero3", replicas=None, accumulate="auto"))
    for each in (*tried, replace(tried[-1], offload="parameters"), replace(small, offload=OFFLOADS[small.kind])):
        for size in (*sizes, rows):
            yield _with(config, each, size)


def _with(config: Config, engine: EngineConfig, micro: int) -> Config:
    return replace(config, engine=engine, train=replace(config.train, micro_batch_size=micro))


def _legal(config: Config, ranks: int) -> bool:
    batch, micro = config.train.batch_sizes.largest, config.train.micro_batch_size
    if config.engine.kind in (*SHARDED, *ZERO) and ranks == 1:
        return False
    divides = batch >= ranks and micro and batch % (ranks * micro) == 0 and config.data.lanes % ranks == 0
    return bool(divides) and not list(engine_rules.problems(config, ranks))


def _arguments(before: Config, after: Config) -> tuple[str, ...]:
    names = ("kind", "recompute", "unit_bytes", "offload")
    pairs = [(f"engine.{name}", getattr(before.engine, name), getattr(after.engine, name)) for name in names]
    pairs.append(("train.micro_batch_size", before.train.micro_batch_size, after.train.micro_batch_size))
    return tuple(f"{name}={new}" for name, old, new in pairs if old != new)
