"""FSDP2 and HSDP for hundreds of layers: which parameters are split, in which units, over which ranks.

Matrices are split by rows over the shard group. Vectors (gains of norms, biases, the gammas of sigma-reparametrised
maps) are a thousandth of the parameters; they stay whole on every rank, in the master precision: a gather in bf16
would round them, and one of a single element would leave ranks empty.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from stablelm.config.engine_rules import hsdp_sizes
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.model.decoder import Decoder

GATHERED_BYTES = 2  # an element of a gathered matrix in bf16
LOCAL_SHARE = 0.1
"""Of a GPU's memory, which `engine.accumulate: auto` spends on unsharded gradients."""


def make_mesh(kind: str, ranks: Ranks, replicas: int | None) -> DeviceMesh:
    """All ranks in a row for fsdp2; (`replicate`, `shard`) for hsdp. Collective."""
    if kind == "fsdp2":
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    copies = replicas or default_replicas(ranks.world_size, ranks.nodes)
    shape = (copies, ranks.world_size // copies)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def default_replicas(world_size: int, nodes: int) -> int:
    """One copy a node, so that gathers stay inside it; the fewest copies there are on a single node."""
    sizes = hsdp_sizes(world_size)
    return nodes if nodes in sizes else sizes[0]


def replicated(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank holds whole."""
    return [parameter for parameter in module.parameters() if parameter.ndim < 2]


def units(layers: nn.ModuleList, unit_bytes: int) -> list[list[nn.Module]]:
    """Consecutive layers together until their matrices reach `unit_bytes` in bf16, see `smallest_unit`; the last unit
    may be smaller."""
    sizes = [sum(GATHERED_BYTES * p.numel() for p in layer.parameters() if p.ndim > 1) for layer in layers]
    return [[layers[index] for index in unit] for unit in grouped(sizes, unit_bytes)]


def smallest_unit(config: Config) -> int:
    """The bytes at which a unit of layers is complete: 0, a layer each, where layers run at several places.

    FSDP2 frees a unit once all its modules ran, which shared layers may do in any order.
    """
    return 0 if config.model.axes.stack.shared else config.engine.unit_bytes


def grouped(sizes: list[int], limit: int) -> list[list[int]]:
    """Places of consecutive items, together until their sizes reach the limit."""
    found, size = [[]], 0
    for place, each in enumerate(sizes):
        found[-1].append(place)
        size += each
        if size >= limit:
            found.append([])
            size = 0
    return found if found[-1] else found[:-1]


def shard(module: Decoder, config: Config, mesh: DeviceMesh) -> None:
    """Splits a model on the meta device: grouped layers, the embeddings and the head as units, the rest in the root.

    Under precision bf16 the matrices of the layers are gathered in bf16 and their gradients summed in
    `engine.reduce_dtype`; embeddings and head are gathered in fp32, since the embedding feeds the fp32 stream and the
    loss sums the head's gradient in fp32. What is freed after its forward pass: `engine.reshard_after_forward`.
    """
    engine, whole = config.engine, set(replicated(module))
    offload = CPUOffloadPolicy() if offloads(config, torch.device(mesh.device_type)) else OffloadPolicy()
    bf16 = torch.bfloat16 if config.train.precision == "bf16" else None
    summed = torch.bfloat16 if engine.reduce_dtype == "bf16" else torch.float32
    inner = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=bf16 and summed, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(cast_forward_inputs=False)
    split = partial(fully_shard, mesh=mesh, offload_policy=offload, ignored_params=whole)
    groups = units(module.layers, smallest_unit(config))
    for group in groups:
        split(group, mp_policy=inner)
    free_head = engine.reshard_after_forward == "always"
    if module.head is not None:  # a tied one stays in the root, where the embedding is used twice
        split([table for table in (module.embedding, module.position) if table is not None], mp_policy=outer)
        # The gradient of a table needs no table.
        cast(FSDPModule, module.embedding).set_unshard_in_backward(False)
        split(module.head, mp_policy=outer, reshard_after_forward=free_head)
    split(module, mp_policy=outer, reshard_after_forward=free_head)
    firsts = [group[0] for group in groups]
    ends = module.head is not None
    _prefetch([module.embedding] * ends + firsts + [module.head] * ends, engine.prefetch, int(ends))


def in_shards(config: Config, parameters: int, memory: float) -> bool:
    """Whether each micro-batch's gradients are reduced into the shards, by `engine.accumulate`.

    `auto` spares the memory of whole gradients where they would take more than `LOCAL_SHARE` of a GPU's, and where
    `engine.reduce_dtype` would add them up in bf16. parameters, memory: bytes of the whole model and of the GPU,
    infinite on a CPU.
    """
    if config.engine.accumulate != "auto":
        return config.engine.accumulate == "sharded"
    return config.engine.reduce_dtype == "bf16" or parameters > LOCAL_SHARE * memory


def offloads(config: Config, device: torch.device) -> bool:
    """Whether shards, gradients and moments go to host memory; on a CPU they are there already."""
    return config.engine.offload == "parameters" and device.type != "cpu"


def allocate(module: nn.Module, device: torch.device, *, offloaded: bool) -> None:
    """Gives a model on the meta device memory, unset: on `device`, split parameters in host memory if offloaded."""
    module.to_empty(device=torch.device("cpu") if offloaded else device)
    if offloaded:
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    setattr(part, name, nn.Parameter(parameter.detach().to(device)))


def _prefetch(units: Sequence[nn.Module | None], depth: int, first: int) -> None:
    """Gathers `depth` units ahead, in both directions, backward down to number `first`; named by their first module."""
    modules = cast(list[FSDPModule], units)
    for index, module in enumerate(modules):
        module.set_modules_to_forward_prefetch(modules[index + 1 : index + 1 + depth])
        module.set_modules_to_backward_prefetch(modules[max(first, index - depth) : index][::-1])
