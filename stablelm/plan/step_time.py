"""An estimate of a step's time: a roofline of one accelerator, the network between them, and the host that drives it.

Not a measurement. Matmuls run at `ATTAINABLE` of the peak. Memory-bound operations move the bytes that the forward pass
keeps (each written once, read in both passes, with a gradient of its size written and read) at `BANDWIDTH` of the
memory's rate, and do not overlap with matmuls. A collective over S ranks moves (S - 1) / S of its tensor into each rank
(twice for an all-reduce) at `WIRE` of the slower of two rates: the links inside a node, and, where the group spans
nodes, the network of a whole node (a ring enters each node once, Patarasuk and Yuan 2009); each collective costs
`LATENCY`. Gathers and reductions of layers overlap with compute where units are prefetched, else only reductions do;
those of the root unit never do. The host starts `1 / HOST` operations a second in eager execution, and the device waits
for it where that is slower. The constants are ours, from what well-tuned training reaches.
"""

from dataclasses import dataclass, replace

from stablelm.config.engine_rules import SHARDED, compiles
from stablelm.config.schema import Config
from stablelm.engine.peak_memory import rank_memory
from stablelm.engine.peak_memory.rank_memory import Layout, Parameter
from stablelm.methods.sizes import flops_per_token
from stablelm.model.linear import make_dtypes
from stablelm.model.memory import layer_memory
from stablelm.model.memory.recompute import is_recomputed
from stablelm.observe.accelerators import Accelerator
from stablelm.optimizers import catalogue
from stablelm.plan.collectives import Collectives

ATTAINABLE = 0.7
BANDWIDTH = 0.75
WIRE = 0.75
LATENCY = 30e-6
HOST = 8e-6
PASSES = 5
RECOMPUTE_PASSES = 2
UPDATE_BYTES = 12  # an fp32 weight and gradient read, the weight written
STATE_BYTES = 2  # each byte of state is read and written


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on each rank, and what they come to."""

    matmul: float
    memory_bound: float
    host: float
    gather: float
    reduce: float
    exposed: float
    """The part of gather and reduce that does not overlap with compute."""
    update: float
    offload: float
    total: float
    flops: float
    """Of all ranks, recompute not counted."""
    mfu: float
    tokens_per_second: float


def step_time(
    config: Config,
    listed: list[Parameter],
    layout: Layout,
    moved: Collectives,
    accelerator: Accelerator,
    *,
    gpus_per_node: int,
    operations: int | None,
) -> StepTime:
    """The estimate for a resolved config; `operations`: how many the host starts in a step, None if unknown."""
    tokens = config.train.batch_sizes.largest * config.data.seq_len
    local_tokens, micro = tokens / layout.world_size, rank_memory.micro_batches(config, layout.world_size)
    flops = flops_per_token(config.model, config.data.seq_len)
    matmul = local_tokens * _computed(config, flops) / (accelerator.peak * ATTAINABLE)
    memory_bound = micro * _memory_bound(config) / (accelerator.memory_bandwidth * BANDWIDTH)
    host = (operations or 0) * HOST * (not compiles(config, layout.kind, device_compiles=True))
    gather, reduce, never_hidden = _wires(listed, layout, moved, accelerator, gpus_per_node, rank_memory.width(config))
    device = max(matmul + memory_bound, host)
    hidden = (gather if config.engine.prefetch else 0.0) + reduce - never_hidden
    exposed = max(0.0, hidden - device) + never_hidden + (0.0 if config.engine.prefetch else gather)
    held = rank_memory.resting(config, listed, layout)
    away = rank_memory.on_host(config, listed, layout, held)
    local = held["weights"] - away["weights"]
    state = held["moments"] - away["moments"]
    update = (local / 4 * UPDATE_BYTES + STATE_BYTES * state) / (accelerator.memory_bandwidth * BANDWIDTH)
    update += _whole_matrices(config, listed, layout) / (accelerator.peak * ATTAINABLE)
    offload = 2 * (away["weights"] + away["gradients"]) / accelerator.host_link
    total = (1 + catalogue.extra_passes(config.train)) * (device + exposed) + update + offload
    return StepTime(
        matmul, memory_bound, host, gather, reduce, exposed, update, offload, total,
        flops * tokens,
        flops * tokens / (total * accelerator.peak * layout.world_size),
        tokens / total,
    )  # fmt: skip


def _whole_matrices(config: Config, listed: list[Parameter], layout: Layout) -> float:
    """FLOPs of an update of whole matrices on each rank."""
    whole = catalogue.find(config.train).whole(hidden=True)
    if whole is None:
        return 0.0
    return sum(whole.flops((each.shape[0], each.shape[1])) for each in listed if each.hidden) / layout.shards


def _computed(config: Config, flops: float) -> float:
    """FLOPs a token including recompute; the forward pass of the layers is a third of their FLOPs."""
    model = config.model
    assert model.vocab_size is not None
    head = 6.0 * model.vocab_size * model.d_model
    return flops + _repeated(config)[0] * (flops - head) / 3


def _repeated(config: Config) -> tuple[float, float]:
    """Shares of the layers' forward FLOPs and of their memory-bound bytes that recompute repeats.

    Attention is taken to be a third of a layer, as 4 of the 12 d_model^2 parameters of its matrices are.
    """
    mode, places = config.engine.recompute, config.model.axes.stack.places(config.model)
    if mode == "attention":
        return 1 / 3, 1 / 3
    whole = sum(is_recomputed(mode, layer) for layer in places) / len(places)
    return whole, float(mode == "selective") or whole


def _memory_bound(config: Config) -> float:
    """Bytes that one micro-batch moves outside of matrix products."""
    model, micro = config.model, config.train.micro_batch_size
    assert model.vocab_size is not None and micro is not None
    layers = layer_memory.measure(replace(config, engine=replace(config.engine, recompute="none"))).layers
    times = PASSES + RECOMPUTE_PASSES * _repeated(config)[1]
    dtypes = make_dtypes(str(config.train.precision), model.stream_dtype)
    bytes_of_a_logit = 2 * (dtypes.parameter.itemsize + dtypes.compute.itemsize)
    return times * layers + micro * config.data.seq_len * model.vocab_size * bytes_of_a_logit


def _wires(
    listed: list[Parameter], layout: Layout, moved: Collectives, accelerator: Accelerator, per_node: int, size: int
) -> tuple[float, float, float]:
    """Seconds of gathers, of reductions, and of the part of both that never overlaps with compute."""
    if layout.world_size == 1:
        return 0.0, 0.0, 0.0
    shards = layout.shards if layout.kind in SHARDED else layout.world_size
    rate = _rate(accelerator, shards, per_node)
    share = (shards - 1) / shards
    gather = moved.bytes["all_gather"] * share / rate + moved.counts["all_gather"] * LATENCY
    reduce = moved.bytes["reduce_scatter"] * share / rate + moved.counts["reduce_scatter"] * LATENCY
    # Copies lie in different nodes, so that each device of a node sums its own part over the network.
    across = min(accelerator.link, accelerator.network) * WIRE if layout.world_size > per_node else rate
    both = 2 * (layout.replicas - 1) / layout.replicas if layout.kind == "hsdp" else 2 * share
    summed = moved.bytes["all_reduce"] - moved.replicas
    gather += moved.bytes["all_to_all"] * share / rate + moved.counts["all_to_all"] * LATENCY
    reduce += both * moved.replicas / across + 2 * share * summed / rate + moved.counts["all_reduce"] * LATENCY
    if layout.kind not in SHARDED:
        return gather, reduce, 0.1 * reduce + (gather if layout.kind in ("zero1", "zero2") else 0.0)
    root = sum(rank_memory.padded(p, shards) for p in listed if p.layer is None and p.is_matrix) * size
    return gather, reduce, 2 * root * share / rate + 4 * LATENCY


def _rate(accelerator: Accelerator, ranks: int, per_node: int) -> float:
    """Bytes a second into each rank of a group of neighbours."""
    node = accelerator.network * per_node
    return WIRE * (accelerator.link if ranks <= per_node else min(accelerator.link, node))
