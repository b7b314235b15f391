"""A torch optimizer that makes the update of an `optimizers.interface.Update` over what this rank holds.

Small tensors are joined into one, large ones are cut, so that an update takes few kernels and little memory. A skipped
step changes no bit: where the host knows (CPUs), nothing is computed; on a GPU results are dropped without asking it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stablelm.engine.tensor_parts import local_part
from stablelm.engine.updates.owners import directions_by_owner
from stablelm.model.devices import to_device
from stablelm.optimizers.interface import Elements, Update, WholeMatrices
from stablelm.private_names import copy_all

STEP = "step"
AT_ONCE = {"cpu": 2**16, "cuda": 2**22}
"""Elements that are updated together: on a CPU as many as stay in its cache."""


@dataclass
class _Member:
    """A parameter of the group: its number there, and this rank's elements of all that belongs to it, flat."""

    index: int
    parameter: nn.Parameter
    gradient: Tensor
    state: dict[str, Tensor]
    curvature: Tensor | None

    @property
    def weight(self) -> Tensor:
        return local_part(self.parameter).detach().reshape(-1)


class _Range(NamedTuple):
    """Elements of a member."""

    member: _Member
    part: slice
    size: int


class RuleOptimizer(torch.optim.Optimizer):
    """State is made by whoever knows the layout; `curvature`: estimates of this step by parameter, if it has any."""

    def __init__(self, groups: list[dict[str, Any]], rule: Update, *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})
        self.rule = rule
        self.curvature: dict[nn.Parameter, Tensor] = {}
        self.looks: bool | None = None
        """Whether the host looks at `found_inf` before an update; None: where that is on the CPU."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            update(self, group, group["params"])


@torch.no_grad()
def update(optimizer: RuleOptimizer, group: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
    """The update of some parameters of a group that have gradients."""
    skipped: Tensor | None = getattr(optimizer, "found_inf", None)
    if skipped is not None and (skipped.is_cpu if optimizer.looks is None else optimizer.looks):
        if bool(skipped):
            return
        skipped = None
    held = [parameter for parameter in parameters if parameter.grad is not None]
    if not held:
        return
    rule, hidden = optimizer.rule, group["hidden"]
    members = [_member(optimizer, index, parameter) for index, parameter in enumerate(held)]
    singles = [name for name, each in rule.states(hidden=hidden).items() if each.single]
    step = _stacked(optimizer, held, STEP) + 1
    values = {name: _stacked(optimizer, held, name) for name in singles}
    whole = rule.whole(hidden=hidden)
    if whole is not None:
        _update_matrices(whole, group, members, skipped)
    else:
        _update_elements(rule, group, members, step, values, skipped)
    for name, new in {STEP: step, **values}.items():
        stored = [optimizer.state[parameter][name] for parameter in held]
        old = torch.stack([each.to(new.device) for each in stored])
        kept = new if skipped is None else torch.where(skipped > 0, old, new.to(old.dtype))
        copy_all(stored, [each.to(place.device) for each, place in zip(kept.unbind(), stored, strict=True)])


def _stacked(optimizer: RuleOptimizer, held: list[nn.Parameter], name: str) -> Tensor:
    """A single value of each parameter, (K,) in the parameters' dtype."""
    return torch.stack([optimizer.state[parameter][name] for parameter in held]).to(held[0].dtype)


def _member(optimizer: RuleOptimizer, index: int, parameter: nn.Parameter) -> _Member:
    assert parameter.grad is not None
    state = {
        name: local_part(tensor).view(-1) for name, tensor in optimizer.state[parameter].items() if tensor.ndim > 0
    }
    curvature = optimizer.curvature.get(parameter)
    flat = None if curvature is None else local_part(curvature).reshape(-1)
    return _Member(index, parameter, local_part(parameter.grad).detach().reshape(-1), state, flat)


def _update_elements(
    rule: Update,
    group: dict[str, Any],
    members: list[_Member],
    step: Tensor,
    values: dict[str, Tensor],
    skipped: Tensor | None,
) -> None:
    """`values` (K,) of single state become those after the update."""
    names = [name for name, each in rule.states(hidden=group["hidden"]).items() if not each.single]
    means = _means(rule, group, members, step, values, names)
    new = {name: each.clone() for name, each in values.items()}
    for chunk in _chunks(members):
        at = _numbers([each.member.index for each in chunk], step.device)
        own = {name: each[at] for name, each in values.items()}
        piece = _piece(rule, group, chunk, names, step[at], own, copied=skipped is not None)
        piece.mean = None if means is None else means[at]
        rule.update(piece)
        _write([each.member.weight[each.part] for each in chunk], piece.weight, chunk, skipped)
        for name in names:
            _write([each.member.state[name][each.part] for each in chunk], piece.state[name], chunk, skipped)
        for name in values:
            new[name][at] = piece.state[name]
    values.update(new)


def _means(
    rule: Update,
    group: dict[str, Any],
    members: list[_Member],
    step: Tensor,
    values: dict[str, Tensor],
    names: list[str],
) -> Tensor | None:
    """Of `Update.statistic` over each whole parameter, (K,); a collective where they are split."""
    sums = torch.zeros(len(members), dtype=torch.float64, device=step.device)
    for chunk in _chunks(members):
        at = _numbers([each.member.index for each in chunk], step.device)
        own = {name: each[at] for name, each in values.items()}
        found = rule.statistic(_piece(rule, group, chunk, names, step[at], own, copied=False))
        if found is None:
            return None
        parts = found.double().split([each.size for each in chunk])
        sums.index_add_(0, at, torch.stack([part.sum() for part in parts]))
    first = members[0].parameter
    if isinstance(first, DTensor):
        dist.all_reduce(sums, group=first.device_mesh.get_group("shard"))
    counts = _numbers([each.parameter.numel() for each in members], step.device)
    return (sums / counts).to(first.dtype)


def _chunks(members: list[_Member]) -> Iterator[list[_Range]]:
    """Small parameters together, large ones in several parts."""
    found: list[_Range] = []
    most = AT_ONCE.get(members[0].gradient.device.type, AT_ONCE["cuda"])
    for member in members:
        total = member.gradient.numel()
        for start in range(0, total, most):
            count = min(most, total - start)
            if found and sum(each.size for each in found) + count > most:
                yield found
                found = []
            found.append(_Range(member, slice(start, start + count), count))
    if found:
        yield found


def _piece(
    rule: Update,
    group: dict[str, Any],
    chunk: list[_Range],
    names: list[str],
    step: Tensor,
    singles: dict[str, Tensor],
    *,
    copied: bool,
) -> Elements:
    """What is stored itself where it is one range in the parameters' dtype, unless it is to be `copied`."""
    dtype = chunk[0].member.gradient.dtype

    def joined(tensors: list[Tensor]) -> Tensor:
        if len(tensors) > 1:
            return torch.cat(tensors).to(dtype)
        return tensors[0].to(dtype, copy=copied)

    state = {name: joined([each.member.state[name][each.part] for each in chunk]) for name in names}
    estimates = [each.member.curvature[each.part] for each in chunk if each.member.curvature is not None]
    counts = _numbers([each.size for each in chunk], step.device)
    each = partial(_spread, counts=counts, total=sum(found.size for found in chunk))
    return Elements(
        joined([each.member.weight[each.part] for each in chunk]),
        joined([each.member.gradient[each.part] for each in chunk]),
        state | singles,
        step,
        group["lr"],
        group["weight_decay"],
        group["eps"],
        group["betas"],
        group["hidden"],
        each,
        curvature=joined(estimates) if estimates else None,
    )


def _numbers(values: list[int], device: torch.device) -> Tensor:
    """On the device, which is not waited for."""
    return to_device(torch.tensor(values), device)


def _spread(values: Tensor, counts: Tensor, total: int) -> Tensor:
    return values if len(values) == 1 else values.repeat_interleave(counts, output_size=total)


def _write(stored: list[Tensor], value: Tensor, chunk: list[_Range], skipped: Tensor | None) -> None:
    """Rounds values to what can be stored; a skipped step changes no bit."""
    if len(stored) == 1 and value.data_ptr() == stored[0].data_ptr():
        return
    value = value.to(stored[0].dtype)
    if skipped is not None:
        value = torch.where(skipped > 0, torch.cat(stored), value)
    copy_all(stored, value.split([each.size for each in chunk]))


def _update_matrices(
    whole: WholeMatrices, group: dict[str, Any], members: list[_Member], skipped: Tensor | None
) -> None:
    """Matrices of a group, gathered by their owners in buckets."""

    def kept(old: Tensor, new: Tensor) -> None:
        old.copy_(new if skipped is None else torch.where(skipped > 0, old, new))

    def inputs(member: _Member) -> Tensor:
        """This rank's rows of what is made orthogonal; the state takes its step."""
        stored = member.state[whole.state]
        new, given = whole.momentum(member.gradient, stored.to(member.gradient.dtype))
        kept(stored, new.to(stored.dtype))
        return given.view(local_part(member.parameter).shape)

    for bucket, directions in directions_by_owner(members, inputs, whole.direction):
        for member, direction in zip(bucket, directions, strict=True):
            rows, columns = member.parameter.shape
            weight = local_part(member.parameter).detach()
            kept(weight, whole.applied(weight, direction, group["lr"], group["weight_decay"], (rows, columns)))
