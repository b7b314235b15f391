"""Reparametrised matrices over ranks: their initial values, and their updates after an optimizer step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name, local_part, part_of
from stablelm.methods import spectral
from stablelm.methods.roles import WRITING
from stablelm.model.initialise import initial_values
from stablelm.private_names import copy_all


class Reparametrised:
    """The reparametrised matrices of a model; empty, and free of cost, where nothing follows the optimizer step."""

    def __init__(self, module: nn.Module):
        self._maps: dict[str, Any] = {
            clean_name(name): part
            for name, part in module.named_modules()
            if (reparam := getattr(part, "reparam", None)) is not None and reparam.after_step
        }
        # Kept because FSDP2 replaces `module.weight` by the gathered matrix in some passes.
        self._weights: list[Any] = [part.weight for part in self._maps.values()]
        self._writes = [name.rpartition(".")[2] in WRITING for name in self._maps]
        self._starts = [_start(weight) for weight in self._weights]
        self._reduce = _reducer(self._weights)
        found = map(_vectors, self._maps.values(), self._weights)
        self._vectors = [vector for own in found for vector in own]
        self._tracked = bool(self._vectors) and not self._vectors[0].is_meta
        if self._tracked:
            # Kept from step to step: an update that must not be made is undone without asking the device.
            self._old, self._new = (torch.cat(self._vectors) for _ in range(2))
            self._new_vectors = self._new.split([len(vector) for vector in self._vectors])
        self.derive()

    def derive(self) -> None:
        """`Reparam.derive` of all matrices; call once weights or vectors were set; a collective on sharded weights."""
        reparam = next((part.reparam for part in self._maps.values()), None)
        if reparam is not None and reparam.derived():
            reparam.derive(self._matrices(self._vectors), self._reduce)

    def update(self, skipped: Tensor) -> dict[str, Tensor]:
        """`Reparam.update` of all matrices; call after each optimizer step, with whether it was skipped (0-dim).

        Returns factors for the rows of each matrix, (1,) or (d_out,), or for its columns, (1, d_in), by name; empty if
        there are none.
        """
        if not self._maps:
            return {}
        reparam = next(iter(self._maps.values())).reparam
        assert reparam is not None
        if not self._tracked:
            factors = reparam.update(self._matrices(self._vectors), self._reduce)
        else:
            torch.cat(self._vectors, out=self._old)
            self._new.copy_(self._old)
            factors = reparam.update(self._matrices(self._new_vectors), self._reduce)
            torch.where(skipped.to(self._old.device), self._old, self._new, out=self._new)
            copy_all(self._vectors, self._new_vectors)
        if factors is None:
            return {}
        factors = [torch.where(skipped.to(factor.device), 1.0, factor) for factor in factors]
        return dict(zip(self._maps, factors, strict=True))

    def scale_rows(self, factors: Mapping[str, Tensor]) -> None:
        """Multiplies matrices that are held whole or in rows by the factors of `update`."""
        for name, weight, first_row in zip(self._maps, self._weights, self._starts, strict=True):
            if name in factors:
                rows, factor = local_part(weight).detach(), factors[name]
                if factor.ndim == 1:  # else of columns, which every rank has all of
                    factor = factor.expand(weight.shape[0])[first_row : first_row + len(rows), None]
                rows.mul_(factor.to(rows.device, rows.dtype))

    def norms(self) -> dict[str, float]:
        """Tracked spectral norm of every matrix that has one, by name."""
        return self._by_name(torch.cat(self._vectors[2::3])) if self._tracked else {}

    def tracking_errors(self) -> dict[str, float]:
        """Relative shortfall of every tracked norm (`spectral.tracking_errors`); a collective on sharded weights."""
        if not self._tracked:
            return {}
        return self._by_name(spectral.tracking_errors(self._matrices(self._vectors), self._reduce))

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self._maps, values.tolist(), strict=True))

    def _matrices(self, vectors: Sequence[Tensor]) -> list[spectral.Matrix] | list[spectral.Slice]:
        """This rank's parts, with u, v and sigma of each in turn from `vectors`."""
        own = zip(*(vectors[place::3] for place in range(3)), strict=True)
        held = list(zip(self._weights, self._starts, own, self._writes, strict=True))
        if any(map(_is_flat, self._weights)):
            return [spectral.Slice(_local_range(weight), start, *own, writes=w) for weight, start, own, w in held]
        return [spectral.Matrix(local_part(weight).detach(), start, *own, writes=w) for weight, start, own, w in held]


def _vectors(part: Any, weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`spectral.vectors` of a matrix of which a rank may hold a part."""
    d_out, d_in = weight.ds_shape if _is_flat(weight) else weight.shape
    return spectral.vectors(part, d_in, d_out)


def initial_tensors(module: nn.Module, config: Config, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(portable name, whole initial value) of all parameters and buffers that are state, in one order on all ranks.

    fp32; float64 beside reparametrised matrices, whose singular values each rank finds for a share of them: these come
    last, after one collective.
    """
    shapes = {clean_name(name): tuple(parameter.shape) for name, parameter in module.named_parameters()}
    shared: dict[str, Tensor] = {}
    starts = spectral.SharedStarts(ranks.rank, ranks.world_size)
    for name, whole in initial_values(shapes, config.model, config.run.seed, starts):
        if whole.dtype == torch.float64:
            shared[name] = whole
        else:
            yield name, whole
    yield from _sum_over_ranks(shared, ranks).items()


def _sum_over_ranks(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums over ranks of 1-dim CPU tensors by name, in one collective."""
    if not parts or ranks.world_size == 1:
        return parts
    flat = torch.cat(list(parts.values())).to(ranks.device)
    dist.all_reduce(flat)
    return dict(zip(parts, flat.split([len(part) for part in parts.values()]), strict=True))


def _reducer(weights: list[Any]) -> spectral.Reduce | None:
    """What sums over the ranks that hold parts of the same copy of the weights; None if each holds them whole."""
    if any(_is_flat(weight) for weight in weights):
        return partial(dist.all_reduce, group=None)
    meshes = [weight.device_mesh for weight in weights if isinstance(weight, DTensor)]
    if not meshes:
        return None
    return partial(dist.all_reduce, group=meshes[0].get_group("shard"))


def _is_flat(weight: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 split the parameter, whose part on this rank is its `ds_tensor`."""
    return hasattr(weight, "ds_tensor")


def _local_range(weight: Any) -> Tensor:
    """This rank's elements, without padding."""
    size = max(0, min(weight.ds_tensor.ds_numel, weight.ds_numel - _start(weight)))
    return weight.ds_tensor.detach()[:size]


def _start(weight: Any) -> int:
    """The index of this rank's first row, or first element under ZeRO-3; it does not change."""
    if _is_flat(weight):
        return min(weight.ds_zero_partition_rank * weight.ds_tensor.ds_numel, weight.ds_numel)
    if not isinstance(weight, DTensor):
        return 0
    return part_of(weight, 0, 1).start // math.prod(weight.shape[1:])
