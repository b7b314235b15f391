"""A rank's peak memory without a simulation: DDP and DeepSpeed have none, and remedies try dozens of settings.

Both are kept, for a simulation is exact to the byte and takes seconds, and this is within 5 % and takes none.
What layers and loss need is measured (`model.memory`), what an engine spreads over ranks follows from the
parameters. Each of the points of a step below can be the peak; a test compares with the simulation.
"""

from collections import Counter

from stablelm.config.engine_rules import SHARDED, ZERO
from stablelm.config.schema import Config
from stablelm.engine.peak_memory import rank_memory
from stablelm.engine.peak_memory.rank_memory import Layout, Parameter, group_units
from stablelm.model.memory import layer_memory
from stablelm.model.memory.layer_memory import LayerMemory

TOKEN_BYTES = 8


def peak(config: Config, listed: list[Parameter], layout: Layout, measured: LayerMemory | None = None) -> Counter[str]:
    """Peak bytes by kind on rank 0's device; what is offloaded does not count.

    `measured`: what the layers need, if that is known already.
    """
    held = rank_memory.resting(config, listed, layout)
    held.subtract(rank_memory.on_host(config, listed, layout, held))
    rest = Counter({kind: held[kind] for kind in ("weights", "masters", "moments")})
    rest["gradients"] = rank_memory.accumulated(config, listed, layout)
    if layout.kind == "ddp":
        rest["reduced"] = held["gradients"]  # its buckets stay
    if layout.kind in ("zero2", "zero3") and rank_memory.micro_batches(config, layout.world_size) > 1:
        rest["gradients"] = held["gradients"]
    rest["inputs"] = 2 * TOKEN_BYTES * config.train.batch_sizes.largest // layout.world_size * config.data.seq_len
    layers, (loss, held_by_loss) = measured or layer_memory.measure(config), layer_memory.loss(config, layout.device)
    sharded = layout.kind in SHARDED
    units = group_units(config, listed)[:-1]
    kept = Counter(activations=layers.kept, weight_copies=layers.weight_copies(sharded=sharded))
    copies = 0 if sharded else layers.layer_copies
    of_unit = Counter(activations=layers.layers // len(units), weight_copies=copies // len(units))
    backward = Counter(temporary=layers.temporary, weight_copies=0 if sharded else layers.recomputed_copies)
    backward += held_by_loss + _gathered(config, units, layout)
    reduced = _reduced(config, units, layout)
    root, without_head = (_root(config, listed, layout, head=head) for head in (True, False))
    gradients = Counter(gradients=max(0, held["gradients"] - rest["gradients"]))
    points = (
        rest + kept + loss + root,
        rest + kept + backward + root,
        rest + (kept - of_unit) + backward + reduced + without_head,
        rest + of_unit + backward + reduced + without_head + gradients,
        rest + _end(config, listed, layout, held),
    )
    return max(points, key=Counter.total)


def _root(config: Config, listed: list[Parameter], layout: Layout, *, head: bool = True) -> Counter[str]:
    """What stays gathered besides the layers; FSDP frees the embedding, and the head once its gradient is there."""
    if layout.kind not in (*SHARDED, "zero3"):
        return Counter()
    root = [parameter for parameter in listed if parameter.layer is None and parameter.is_matrix]
    if layout.kind in SHARDED:
        tables, heads, rest = rank_memory.ends(root)
        root = rest + heads * head + tables * (config.engine.reshard_after_forward == "never")
    return Counter(gathered=_size(config, root, layout))


def _size(config: Config, matrices: list[Parameter], layout: Layout) -> int:
    """Bytes, gathered in the parameters' dtype."""
    return sum(rank_memory.padded(parameter, layout.shards) for parameter in matrices) * rank_memory.width(config)


def _gathered(config: Config, units: list[list[Parameter]], layout: Layout) -> Counter[str]:
    """In the backward pass of a unit: gathered units, and the unit's gradients before they are reduced."""
    if layout.kind == "zero3":
        return Counter(gathered=(1 + config.engine.prefetch) * _bucket(config, units) * rank_memory.width(config))
    if layout.kind not in SHARDED:
        return Counter()
    width = rank_memory.gathered_width(config)
    unit, kept = _largest(units, layout) * width, (1 + config.engine.prefetch) * _largest(units, layout)
    if config.engine.reshard_after_forward == "never":
        kept = sum(rank_memory.padded(parameter, layout.shards) for unit in units for parameter in unit)
    return Counter(gathered=kept * width, temporary=unit)


def _reduced(config: Config, units: list[list[Parameter]], layout: Layout) -> Counter[str]:
    """Buffers of reductions while the next unit runs backward."""
    if layout.kind in ZERO:
        return Counter(reduced=2 * _bucket(config, units) * rank_memory.width(config))
    if layout.kind not in SHARDED:
        return Counter()
    return Counter(reduced=_largest(units, layout) * rank_memory.width(config))


def _largest(units: list[list[Parameter]], layout: Layout) -> int:
    return max(sum(rank_memory.padded(parameter, layout.shards) for parameter in unit) for unit in units)


def _bucket(config: Config, units: list[list[Parameter]]) -> int:
    """Elements of ZeRO's buckets: `engine.unit_bytes`, or the largest matrix."""
    return max(config.engine.unit_bytes // 4 * 2, max(parameter.elements for unit in units for parameter in unit))


def _end(config: Config, listed: list[Parameter], layout: Layout, held: Counter[str]) -> Counter[str]:
    """All gradients, and those of the embedding, or of a tied root unit, once more on their way to their owners."""
    found = _root(config, listed, layout, head=False)
    if layout.kind in SHARDED:
        tables, _, rest = rank_memory.ends([p for p in listed if p.layer is None and p.is_matrix])
        size = _size(config, [*tables, *rest], layout)
        found += Counter(reduced=size, temporary=size)
    # Sharded by now, in place of what accumulated.
    found["gradients"] = held["gradients"] - rank_memory.accumulated(config, listed, layout)
    return found
