"""What each rank stores of a model: parameters, gradients and optimizer state (Adam's moments) of every engine.

It follows from the shapes of the parameters alone. FSDP2 and HSDP (`engine.sharding`): of a matrix of R rows over S
shards rank r holds rows r * ceil(R / S) up to (r + 1) * ceil(R / S), and each unit is gathered with its matrices padded
to S * ceil(R / S) rows; vectors are replicated. ZeRO: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models, 2020, section 5, with fp32 working parameters beside the fp32 master parameters that Adam
updates (`engine.deepspeed_config`).
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from stablelm.config.engine_rules import SHARDED, ZERO
from stablelm.config.schema import Config, ModelConfig
from stablelm.engine.deepspeed_config import PERSISTENT
from stablelm.engine.sharding import GATHERED_BYTES, default_replicas, grouped, smallest_unit
from stablelm.engine.updates.state import is_hidden, state_bytes
from stablelm.model.initialise import decays, roles
from stablelm.model.memory.layer_memory import on_meta
from stablelm.optimizers import catalogue

DDP_BUCKET_BYTES, DDP_FIRST_BUCKET_BYTES = 25 * 2**20, 2**20
ALIGNMENT = 2  # elements, of each rank's shard of a flat ZeRO group


class Parameter(NamedTuple):
    """A parameter of the model, unsharded; `group` identifies parameters with the same AdamW options."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    group: tuple
    hidden: bool = False
    """Whether it is a matrix of the layers."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1


@dataclass(frozen=True)
class Layout:
    """How an engine uses `world_size` ranks: `replicas` copies of the model, each sharded over `shards` ranks.

    `device`: the type of theirs, which decides how many logits the loss holds at once.
    """

    kind: str
    world_size: int
    replicas: int
    device: str = "cpu"

    @property
    def shards(self) -> int:
        return self.world_size // self.replicas


def make_layout(config: Config, kind: str, world_size: int, nodes: int, device: str = "cpu") -> Layout:
    """The layout of a resolved config; the default number of copies of hsdp depends on `nodes`."""
    replicas = 1
    if kind == "hsdp":
        replicas = config.engine.replicas or default_replicas(world_size, nodes)
    elif kind in ("single", "ddp", "zero1", "zero2"):
        replicas = world_size
    return Layout(kind, world_size, replicas, device)


def parameters(config: Config) -> list[Parameter]:
    """Every parameter of the real model, built on the meta device."""
    return list(_parameters(config.model, str(config.train.precision)))


@lru_cache(maxsize=4)
def _parameters(model: ModelConfig, precision: str) -> tuple[Parameter, ...]:
    decoder = on_meta(model, precision)
    found = roles(decoder)
    listed = []
    for name, parameter in decoder.named_parameters():
        role = found[name]
        factors = model.axes.init.rates(model, in_layer=role.layer is not None, matrix=parameter.ndim == 2)
        listed.append(
            Parameter(name, tuple(parameter.shape), role.kind, role.layer, (factors, decays(role)), is_hidden(role))
        )
    return tuple(listed)


def at_depth(listed: list[Parameter], n_layers: int) -> list[Parameter]:
    """The parameters with another number of layers, of which the new ones are like the last; names are not renewed."""
    last = max(parameter.layer or 0 for parameter in listed)
    kept = [parameter for parameter in listed if parameter.layer is None or parameter.layer < n_layers]
    again = [parameter for parameter in listed if parameter.layer == last]
    return kept + [parameter._replace(layer=layer) for layer in range(last + 1, n_layers) for parameter in again]


def width(config: Config) -> int:
    """Bytes per element of a stored parameter."""
    return 8 if config.train.precision == "fp64" else 4


def gathered_width(config: Config) -> int:
    """Bytes per element of a layer's gathered parameter."""
    return GATHERED_BYTES if config.train.precision == "bf16" else width(config)


def rows_of(parameter: Parameter, shards: int, rank: int) -> int:
    """Rows of a matrix on one rank of FSDP's shard group."""
    rows = parameter.shape[0]
    chunk = -(-rows // shards)
    return max(0, min(chunk, rows - rank * chunk))


def padded(parameter: Parameter, shards: int) -> int:
    """Elements of a gathered matrix, including padding."""
    rows = parameter.shape[0]
    return -(-rows // shards) * shards * (parameter.elements // rows)


def resting(config: Config, listed: list[Parameter], layout: Layout, rank: int = 0) -> Counter[str]:
    """Bytes of `weights`, `gradients` and `moments`, under ZeRO also `masters`, on one rank before the update.

    Moments are all optimizer state, and copies that an optimizer holds during the passes.

    Host memory is included; rank 0 has the most.
    """
    if layout.kind in ZERO:
        return _zero(config, listed, layout)
    elements, moments, largest = 0, 0, 0
    for parameter in listed:
        shape = parameter.shape
        if layout.kind in SHARDED and parameter.is_matrix:
            shape = (rows_of(parameter, layout.shards, rank % layout.shards), *shape[1:])
        elements, largest = elements + math.prod(shape), max(largest, math.prod(shape))
        moments += state_bytes(shape, config.train, width(config), hidden=parameter.hidden)
    moments += catalogue.find(config.train).copies() * elements * width(config)
    gradients = largest if config.engine.optimizer_in_backward else elements
    return Counter(weights=elements * width(config), gradients=gradients * width(config), moments=moments)


def _zero(config: Config, listed: list[Parameter], layout: Layout) -> Counter[str]:
    stage, world, size = int(layout.kind[-1]), layout.world_size, width(config)
    whole = sum(parameter.elements for parameter in listed)
    if stage == 3:
        part = sum(-(-parameter.elements // world) for parameter in listed)
        persistent = sum(parameter.elements for parameter in listed if parameter.elements <= PERSISTENT)
        working = part + persistent
    else:
        groups: Counter[tuple] = Counter()
        for parameter in listed:
            groups[parameter.group] += parameter.elements
        part = sum(-(-elements // (ALIGNMENT * world)) * ALIGNMENT for elements in groups.values())
        working = whole
    gradients = whole if stage == 1 else part
    moments = state_bytes((part,), config.train, size, hidden=False)
    return Counter(weights=working * size, masters=part * size, gradients=gradients * size, moments=moments)


def on_host(config: Config, listed: list[Parameter], layout: Layout, held: Counter[str]) -> Counter[str]:
    """The part of `held` that `engine.offload` keeps in host memory."""
    offload = config.engine.offload
    if offload == "none":
        return Counter()
    if layout.kind in SHARDED:
        vectors = [parameter for parameter in listed if not parameter.is_matrix]
        here = resting(config, vectors, layout)
        return Counter({kind: held[kind] - here[kind] for kind in ("weights", "gradients", "moments")})
    kinds = ["masters", "moments", "gradients"] + (["weights"] if offload == "parameters" else [])
    return Counter({kind: held[kind] for kind in kinds})


def accumulated(config: Config, listed: list[Parameter], layout: Layout) -> int:
    """Bytes of unreduced gradients that accumulate until the last of several micro-batches; 0 for a single one.

    FSDP2 and HSDP reduce nothing before it, unless `engine.accumulate` is sharded: each rank accumulates unsharded fp32
    gradients.
    """
    if micro_batches(config, layout.world_size) == 1 or layout.kind in ("zero2", "zero3"):
        return 0
    if layout.kind in SHARDED and config.engine.accumulate == "sharded":
        return resting(config, listed, layout)["gradients"]
    return sum(parameter.elements for parameter in listed) * width(config)


def micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches per rank and step."""
    micro = config.train.micro_batch_size
    assert micro is not None
    return config.train.batch_sizes.largest // world_size // micro


def group_units(config: Config, listed: list[Parameter]) -> list[list[Parameter]]:
    """Matrices of each unit of FSDP, by the rule of `engine.sharding.units`; what is outside the layers comes last."""
    layers: list[list[Parameter]] = [[] for _ in range(config.model.axes.stack.distinct(config.model))]
    root = []
    for parameter in listed:
        if parameter.is_matrix:
            (root if parameter.layer is None else layers[parameter.layer]).append(parameter)
    sizes = [sum(GATHERED_BYTES * parameter.elements for parameter in matrices) for matrices in layers]
    units = grouped(sizes, smallest_unit(config))
    return [*([parameter for index in unit for parameter in layers[index]] for unit in units), root]


def ends(root: list[Parameter]) -> tuple[list[Parameter], list[Parameter], list[Parameter]]:
    """Of the matrices outside the layers those of the embeddings' unit, of the head's and of the root's."""
    head = [parameter for parameter in root if parameter.name == "head.weight"]
    if not head:
        return [], [], root
    tables = [parameter for parameter in root if parameter.name in ("embedding.weight", "position.weight")]
    return tables, head, [parameter for parameter in root if parameter not in (*head, *tables)]
