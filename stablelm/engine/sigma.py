"""Spectrally normalised matrices of a model as this rank holds them, and the collective of their refresh."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stablelm.checkpoint.portable import clean_name
from stablelm.engine.mesh import Ranks
from stablelm.methods import spectral
from stablelm.model.linear import Linear


class SigmaMatrices:
    """The sigma-reparametrised matrices of a model; empty, and free of cost, where there are none."""

    def __init__(self, module: nn.Module):
        self._maps = {
            clean_name(name): part
            for name, part in module.named_modules()
            if isinstance(part, Linear) and part.gamma is not None
        }
        sharded = any(isinstance(part.weight, DTensor) for part in self._maps.values())
        self._first_rows = [_first_row(part.weight) for part in self._maps.values()]
        self._reduce = _sum_over_ranks if sharded else None

    def refresh(self) -> None:
        """One power iteration for all matrices, at most one all-reduce; call after each optimizer step."""
        spectral.refresh(self._matrices(), self._reduce)

    def norms(self) -> dict[str, float]:
        """Tracked sigma of every matrix by name; a collective on sharded weights."""
        return self._by_name(spectral.estimates) if self._maps else {}

    def tracking_errors(self) -> dict[str, float]:
        """Relative shortfall of every tracked sigma (`spectral.tracking_errors`); a collective on sharded weights."""
        return self._by_name(spectral.tracking_errors) if self._maps else {}

    def _by_name(self, measure) -> dict[str, float]:
        return dict(zip(self._maps, measure(self._matrices(), self._reduce).tolist(), strict=True))

    def _matrices(self) -> list[spectral.Matrix]:
        return [
            spectral.Matrix(_local(part.weight), first_row, part.u, part.v)
            for part, first_row in zip(self._maps.values(), self._first_rows, strict=True)
        ]


def sum_over_ranks(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums over ranks of 1-dim CPU tensors by name, in one collective."""
    if not parts or ranks.world_size == 1:
        return parts
    flat = torch.cat(list(parts.values())).to(ranks.device)
    dist.all_reduce(flat)
    return dict(zip(parts, flat.split([len(part) for part in parts.values()]), strict=True))


def _sum_over_ranks(flat: Tensor) -> None:
    dist.all_reduce(flat)


def _local(weight: Tensor) -> Tensor:
    """This rank's rows of a matrix."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _first_row(weight: Tensor) -> int:
    """The index of this rank's first row; it does not change."""
    if not isinstance(weight, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[0]
