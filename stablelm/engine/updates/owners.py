"""Whole matrices of which each rank holds rows: each is gathered by the rank that owns it, and what it makes of it is
given back, by one all-to-all there and one back for a bucket of matrices.

Ranks that hold copies (ddp, the replicas of hsdp) do the same work at the same time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 2**25
"""Elements of the whole matrices of a bucket; each has at least one matrix a rank, if there are so many."""
Shape = tuple[int, int]


class HasMatrix(Protocol):
    """Something about a matrix."""

    parameter: nn.Parameter


M = TypeVar("M", bound=HasMatrix)


def directions_by_owner(
    members: Sequence[M], inputs: Callable[[M], Tensor], direction: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[M], list[Tensor]]]:
    """(members of a bucket, this rank's rows of `direction` of their whole inputs), bucket by bucket.

    `inputs` gives this rank's rows and is called once for each. Collective where matrices are split.
    """
    first = members[0].parameter
    if not isinstance(first, DTensor):
        for member in members:
            yield [member], [direction(inputs(member))]
        return
    group = first.device_mesh.get_group("shard")
    shapes = [(member.parameter.shape[0], member.parameter.shape[1]) for member in members]
    device = torch.device(first.device_mesh.device_type)
    for bucket in buckets(shapes, group.size()):
        part = [members[index] for index in bucket]
        rows, whole = [inputs(member) for member in part], [shapes[index] for index in bucket]
        yield part, _exchanged(rows, whole, direction, group, device)


def buckets(shapes: Sequence[Shape], ranks: int) -> list[list[int]]:
    """Places of consecutive matrices, together until they fill `BUCKET` and give each rank one."""
    found, size = [[]], 0
    for place, (rows, columns) in enumerate(shapes):
        found[-1].append(place)
        size += rows * columns
        if size >= BUCKET and len(found[-1]) >= ranks:
            found.append([])
            size = 0
    return found if found[-1] else found[:-1]


def owners(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """The rank that owns each matrix: the one with the least work so far, the costly matrices first."""
    work, found = [0] * ranks, [0] * len(shapes)
    for place in sorted(range(len(shapes)), key=lambda place: (-_cost(shapes[place]), place)):
        found[place] = min(range(ranks), key=lambda rank: work[rank])
        work[found[place]] += _cost(shapes[place])
    return found


def _cost(shape: Shape) -> int:
    return shape[0] * shape[1] * min(shape)


def _rows(rows: int, rank: int, ranks: int) -> int:
    """Rows of a matrix on a rank, as FSDP2 splits them."""
    each = -(-rows // ranks)
    return max(0, min(each, rows - rank * each))


def _exchanged(
    inputs: list[Tensor],
    shapes: list[Shape],
    direction: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Tensor]:
    """This rank's rows of the directions, computed on `device`, from its rows of the inputs, which may be offloaded."""
    ranks, own = group.size(), group.rank()
    owner = owners(shapes, ranks)
    sent = [[place for place, rank in enumerate(owner) if rank == to] for to in range(ranks)]
    here = sent[own]
    out_sizes = [sum(inputs[place].numel() for place in sent[to]) for to in range(ranks)]
    in_sizes = [sum(_rows(shapes[place][0], of, ranks) * shapes[place][1] for place in here) for of in range(ranks)]
    flat = torch.cat([inputs[place].reshape(-1) for places in sent for place in places])
    received = flat.new_empty(sum(in_sizes))
    dist.all_to_all_single(received, flat, in_sizes, out_sizes, group=group)
    parts = _split(received, in_sizes, [[_numel(shapes[place], of, ranks) for place in here] for of in range(ranks)])
    whole = [
        direction(torch.cat([parts[of][index] for of in range(ranks)]).view(shapes[place]).to(device))
        for index, place in enumerate(here)
    ]
    made = [each.to(flat.device, flat.dtype).contiguous().view(-1) for each in whole]
    pieces = [
        each.split([_numel(shapes[place], of, ranks) for of in range(ranks)])
        for each, place in zip(made, here, strict=True)
    ]
    back = torch.cat([piece[of] for of in range(ranks) for piece in pieces]) if pieces else flat.new_empty(0)
    returned = torch.empty_like(flat)
    dist.all_to_all_single(returned, back, out_sizes, in_sizes, group=group)
    given = _split(returned, out_sizes, [[inputs[place].numel() for place in places] for places in sent])
    found = {
        place: part
        for places, parts in zip(sent, given, strict=True)
        for place, part in zip(places, parts, strict=True)
    }
    return [found[place].view(inputs[place].shape) for place in range(len(inputs))]


def _numel(shape: Shape, rank: int, ranks: int) -> int:
    return _rows(shape[0], rank, ranks) * shape[1]


def _split(flat: Tensor, sizes: list[int], inner: list[list[int]]) -> list[tuple[Tensor, ...]]:
    """A flat tensor cut in two levels."""
    return [part.split(own) if own else () for part, own in zip(flat.split(sizes), inner, strict=True)]
