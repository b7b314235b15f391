"""Spectrally normalised matrices of a model as this rank holds them, and the collective of their refresh."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name, part_of
from stablelm.methods import spectral
from stablelm.model.linear import Linear
from stablelm.private_names import copy_all


class SigmaMatrices:
    """The sigma-reparametrised matrices of a model; empty, and free of cost, where there are none."""

    def __init__(self, module: nn.Module):
        self._maps = {
            clean_name(name): part
            for name, part in module.named_modules()
            if isinstance(part, Linear) and part.reparam is not None and part.reparam.after_step
        }
        # Kept: FSDP2 puts the gathered matrix in the place of its shard for some passes.
        self._weights: list[Any] = [part.weight for part in self._maps.values()]
        self._starts = [_start(weight) for weight in self._weights]
        self._reduce = _reducer(self._weights)

    def refresh(self, skipped: Tensor | None = None) -> None:
        """One power iteration for all matrices; call after each optimizer step, with whether it was skipped (0-dim).

        No all-reduce if every rank holds whole matrices, one if it holds rows, two if it holds flat ranges (ZeRO-3).
        """
        if not self._maps:
            return
        vectors = [vector for part in self._maps.values() for vector in (part.u, part.v)]
        kept = torch.cat(vectors)
        spectral.refresh(self._matrices(), self._reduce)
        if skipped is not None:
            found = torch.where(skipped.to(kept.device), kept, torch.cat(vectors))
            parts = found.split([len(vector) for vector in vectors])
            copy_all(vectors, parts)

    def norms(self) -> dict[str, float]:
        """Tracked sigma of every matrix by name; a collective on sharded weights."""
        return self._by_name(spectral.estimates) if self._maps else {}

    def tracking_errors(self) -> dict[str, float]:
        """Relative shortfall of every tracked sigma (`spectral.tracking_errors`); a collective on sharded weights."""
        return self._by_name(spectral.tracking_errors) if self._maps else {}

    def _by_name(self, measure) -> dict[str, float]:
        return dict(zip(self._maps, measure(self._matrices(), self._reduce).tolist(), strict=True))

    def _matrices(self) -> list[spectral.Matrix] | list[spectral.Slice]:
        held = list(zip(self._weights, self._starts, self._maps.values(), strict=True))
        if any(map(_is_flat, self._weights)):
            return [spectral.Slice(_local_range(weight, at.u), start, at.u, at.v) for weight, start, at in held]
        return [spectral.Matrix(_local(weight, at.u), first_row, at.u, at.v) for weight, first_row, at in held]


def sum_over_ranks(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums over ranks of 1-dim CPU tensors by name, in one collective."""
    if not parts or ranks.world_size == 1:
        return parts
    flat = torch.cat(list(parts.values())).to(ranks.device)
    dist.all_reduce(flat)
    return dict(zip(parts, flat.split([len(part) for part in parts.values()]), strict=True))


def _reducer(weights: list[Any]) -> Callable[[Tensor], None] | None:
    """What sums over the ranks that hold parts of the same copy of the weights; None if each holds them whole."""
    if any(_is_flat(weight) for weight in weights):
        return partial(_sum, group=None)
    meshes = [weight.device_mesh for weight in weights if isinstance(weight, DTensor)]
    if not meshes:
        return None
    return partial(_sum, group=meshes[0].get_group("shard"))


def _sum(flat: Tensor, group: dist.ProcessGroup | None) -> None:
    dist.all_reduce(flat, group=group)


def _local(weight: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a matrix, beside `like`."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach().to(like.device)


def _is_flat(weight: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 split the parameter, whose part on this rank is its `ds_tensor`."""
    return hasattr(weight, "ds_tensor")


def _local_range(weight: Any, like: Tensor) -> Tensor:
    """This rank's elements, without padding, beside `like`."""
    size = max(0, min(weight.ds_tensor.ds_numel, weight.ds_numel - _start(weight)))
    return weight.ds_tensor.detach()[:size].to(like.device)


def _start(weight: Any) -> int:
    """The index of this rank's first row, or first element under ZeRO-3; it does not change."""
    if _is_flat(weight):
        return min(weight.ds_zero_partition_rank * weight.ds_tensor.ds_numel, weight.ds_numel)
    if not isinstance(weight, DTensor):
        return 0
    return part_of(weight, 0, 1).start // math.prod(weight.shape[1:])
