"""A rank's peak memory in closed form: for engines that are not simulated, and to try many settings in no time.

Three moments can be the fullest (derived here, and held against the simulation by a test): the loss, the backward pass
of the last layers, and the end of the backward pass, when the gradients of embedding and head are summed over ranks.
"""

from collections import Counter

from stablelm.config.engine_rules import SHARDED, ZERO
from stablelm.config.schema import Config
from stablelm.model.loss import CHUNK_BYTES
from stablelm.plan import activations, memory
from stablelm.plan.memory import Layout, Parameter


def peak(config: Config, listed: list[Parameter], layout: Layout) -> Counter[str]:
    """Bytes by kind on rank 0's device at the fullest moment; what is offloaded does not count."""
    held = memory.resting(config, listed, layout)
    held.subtract(memory.on_host(config, listed, layout, held))
    rest = Counter({kind: held[kind] for kind in ("weights", "masters", "moments")})
    rest["gradients"] = memory.accumulated(config, listed, layout)
    if layout.kind == "ddp":
        rest["reduced"] = held["gradients"]  # its buckets stay
    if layout.kind in ("zero2", "zero3") and memory.micro_batches(config, layout.world_size) > 1:
        rest["gradients"] = held["gradients"]
    kept = Counter(activations=activations.kept(config), weight_copies=memory.weight_copies(config, listed, layout))
    moments = (
        rest + kept + _loss(config) + _root(config, listed, layout),
        rest + kept + _layer(config, listed, layout) + _root(config, listed, layout),
        rest + _end(config, listed, layout, held),
    )
    return max(moments, key=Counter.total)


def _loss(config: Config) -> Counter[str]:
    """A chunk of logits in two dtypes, the head in the compute dtype, and the gradients taken right away."""
    sizes, model = activations.sizes_of(config), config.model
    assert model.vocab_size is not None
    head = model.vocab_size * model.d_model
    chunk = min(CHUNK_BYTES, sizes.tokens * model.vocab_size * sizes.parameter)
    found = Counter(
        activations=sizes.tokens * model.d_model * sizes.compute + head * (sizes.parameter + sizes.compute),
        loss_chunk=chunk,
    )
    if sizes.compute != sizes.parameter:
        found["weight_copies"] = head * sizes.compute
        found["loss_chunk"] += chunk * sizes.compute // sizes.parameter
    return found


def _root(config: Config, listed: list[Parameter], layout: Layout) -> Counter[str]:
    """What stays gathered besides the layers: embedding, head and projection."""
    if layout.kind not in (*SHARDED, "zero3"):
        return Counter()
    root = sum(memory.padded(p, layout.shards) for p in listed if p.layer is None and p.is_matrix)
    return Counter(gathered=root * memory.width(config))


def _layer(config: Config, listed: list[Parameter], layout: Layout) -> Counter[str]:
    """The backward pass of the last layers: units gathered, gradients of one unit before and while they are summed."""
    sizes, model = activations.sizes_of(config), config.model
    assert model.d_ff is not None
    assert model.vocab_size is not None
    found = Counter(
        activations=activations.recomputed(config) + model.vocab_size * model.d_model * sizes.parameter,
        temporary=sizes.tokens * model.d_ff * sizes.compute,
    )
    largest = max(
        sum(memory.padded(p, layout.shards) for p in unit) for unit in memory.group_units(config, listed)[:-1]
    )
    size, gathered = memory.width(config), memory.gathered_width(config)
    if layout.kind in SHARDED:
        found["gathered"] = (1 + config.engine.prefetch) * largest * gathered
        found["reduced"] = largest * size
        found["temporary"] += largest * gathered
    elif layout.kind in ZERO:
        bucket = max(config.engine.unit_bytes // 4 * 2, max(p.elements for p in listed if p.layer is not None))
        found["reduced"] = 2 * bucket * size
        if layout.kind == "zero3":
            found["gathered"] = (1 + config.engine.prefetch) * bucket * size
    return found


def _end(config: Config, listed: list[Parameter], layout: Layout, held: Counter[str]) -> Counter[str]:
    """All gradients, and those of the root unit once more on their way to their owners."""
    root = _root(config, listed, layout)
    found = root + Counter(gradients=max(0, held["gradients"] - memory.accumulated(config, listed, layout)))
    if layout.kind in SHARDED:
        found += Counter(reduced=root["gathered"], temporary=root["gathered"])
        found["gradients"] = held["gradients"] - memory.accumulated(config, listed, layout)
    return found
