"""Where each parameter lies in the flat buffers of DeepSpeed's ZeRO optimizers, and its part as a FlatShard.

A ZeRO optimizer keeps fp32 master weights and the optimizer's state of this rank as one flat tensor a group. This
reads the layout from its attributes, which are not a public interface: the version is pinned, and a test reads
everything back.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablelm.config.schema import TrainConfig
from stablelm.engine.tensor_parts import FlatShard
from stablelm.engine.updates.state import empty_state
from stablelm.private_names import forget_offloaded_gradients, publish_zero3_group


class BufferSlice(NamedTuple):
    """Elements [start, start + length) of a parameter are [offset, offset + length) of the flat buffer `group`."""

    group: int
    offset: int
    start: int
    length: int
    shape: tuple[int, ...]

    def shard(self, flat: Tensor) -> FlatShard:
        """The live part of a buffer that is laid out like the group's."""
        return FlatShard(flat.detach()[self.offset : self.offset + self.length], self.shape, self.start)


def buffer_slices(zero: Any, stage: int, names: dict[nn.Parameter, str]) -> dict[str, BufferSlice]:
    """The place of every parameter, by name, in the buffers of a DeepSpeed ZeRO optimizer; length 0: not here."""
    return _of_stage_3(zero, names) if stage == 3 else _of_stage_1_2(zero, names)


def _of_stage_3(zero: Any, names: dict[nn.Parameter, str]) -> dict[str, BufferSlice]:
    """Each parameter is cut into equal parts, one a rank, the last ones padded; parts follow one another."""
    found = {}
    for group, parameters in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in parameters:
            shard = whole_shard(parameter)
            found[names[parameter]] = BufferSlice(
                group, offset, shard.start, len(shard.local), tuple(parameter.ds_shape)
            )
            offset += parameter.partition_numel()
    return found


def _of_stage_1_2(zero: Any, names: dict[nn.Parameter, str]) -> dict[str, BufferSlice]:
    """All parameters of a group follow one another, and the whole is cut into equal parts, one a rank."""
    found = {}
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        size = zero.partition_size[group]
        begin = torch.distributed.get_rank(zero.real_dp_process_group[group]) * size
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            first = min(max(begin - offset, 0), parameter.numel())
            stop = min(max(begin + size - offset, 0), parameter.numel())
            inside = max(0, offset - begin) if stop > first else 0
            found[names[parameter]] = BufferSlice(group, inside, first, stop - first, tuple(parameter.shape))
    return found


def masters(zero: Any, stage: int) -> Sequence[Tensor]:
    """The flat fp32 weights of this rank that the optimizer updates, one tensor a group."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def make_state(optimizer: torch.optim.Optimizer, flats: Sequence[Tensor], train: TrainConfig) -> None:
    """The optimizer's state as before the first step, so that every checkpoint has the same tensors."""
    for flat in flats:
        optimizer.state[flat] = empty_state(flat.detach(), train, hidden=False)


def publish(zero: Any, stage: int) -> None:
    """Copies the master weights into what the forward pass reads, on all ranks; collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero.parameter_offload.partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        publish_zero3_group(zero, group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def whole_shard(parameter: Any) -> FlatShard:
    """This rank's part of a parameter that ZeRO-3 split, without padding: what is gathered from."""
    size, total = parameter.ds_tensor.ds_numel, math.prod(parameter.ds_shape)
    start = min(parameter.ds_zero_partition_rank * size, total)
    return FlatShard(parameter.ds_tensor.detach()[: min(size, total - start)], tuple(parameter.ds_shape), start)


def forget_gradients(zero: Any, stage: int) -> None:
    """Drops the gradients of backward passes, wherever they stopped."""
    zero.zero_grad()
    if stage == 3:
        zero.averaged_gradients = {}
        forget_offloaded_gradients(zero, stage)
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
        return
    for group in range(len(zero.bit16_groups)):
        zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
    zero.micro_step_id = -1
    if zero.cpu_offload:
        forget_offloaded_gradients(zero, stage)
        zero.reset_cpu_buffers()


def gradient_shards(zero: Any, stage: int, where: dict[str, BufferSlice]) -> dict[str, FlatShard]:
    """This rank's part of every gradient, summed over ranks and not yet clipped, after the last backward pass."""
    offloaded = zero.offload_optimizer if stage == 3 else zero.cpu_offload
    if offloaded:
        flats = [flat.grad for flat in masters(zero, stage) if flat.grad is not None]
    else:
        groups = range(len(masters(zero, stage)))
        flats = [torch.cat([part.flatten() for part in zero.averaged_gradients[group]]) for group in groups]
    return {name: place.shard(flats[place.group]) for name, place in where.items()}
