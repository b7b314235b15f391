"""Steps of several passes over the batch: SAM moves weights between two of them, Sophia keeps a curvature of one."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stablelm.engine.tensor_parts import local_part
from stablelm.engine.updates.rule_optimizer import RuleOptimizer
from stablelm.model.devices import to_device
from stablelm.optimizers.interface import ASCENDED, CURVATURE, GRADIENT, Update
from stablelm.optimizers.sam import DIRECTION, NORM_EPS, SamUpdate

Norm = Callable[[], Tensor]
"""The global norm of the gradients that there are; a collective where they are split."""


class Passes:
    """What lies between the passes of a step; copies live from one of them to the update."""

    def __init__(self, rule: Update, optimizer: torch.optim.Optimizer, norm: Norm, moved: Callable[[], None]):
        """`moved` is called on all ranks once weights were set."""
        self._rule, self._optimizer, self._norm, self._moved = rule, optimizer, norm, moved
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._kinds: tuple[str, ...] = (GRADIENT,)
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._first: dict[nn.Parameter, Tensor] = {}
        self._directions: dict[nn.Parameter, Tensor] = {}
        self._not_finite: Tensor | None = None

    def begin(self, step: int) -> tuple[str, ...]:
        """The passes of an optimizer step, counted from 1."""
        self.forget()
        self._kinds = self._rule.passes(step)
        return self._kinds

    def forget(self) -> None:
        """Drops what earlier passes left."""
        self._weights, self._first, self._directions, self._not_finite = {}, {}, {}, None
        if isinstance(self._optimizer, RuleOptimizer):
            self._optimizer.curvature.clear()

    @torch.no_grad()
    def end(self, kind: str, valid: Tensor) -> None:
        """After the backward passes of a pass, with the valid targets of all ranks (0-dim); collective."""
        if kind == CURVATURE:
            self._estimate(valid)
        elif kind == GRADIENT and ASCENDED in self._kinds:
            self._ascend()
        elif kind == ASCENDED:
            self._descend()
        elif isinstance(self._rule, SamUpdate) and self._rule.looks:
            self._add_direction(self._rule.options.alpha)

    def checked(self, norm: Tensor) -> Tensor:
        """The norm of the update's gradient, not finite where that of an earlier pass was not."""
        return norm if self._not_finite is None else norm + to_device(self._not_finite, norm.device)

    @torch.no_grad()
    def finish(self, skipped: Tensor) -> None:
        """With the update: what is kept for later steps, unless it was skipped (0-dim bool)."""
        for parameter, new in self._directions.items():
            stored = local_part(self._optimizer.state[parameter][DIRECTION])
            stored.copy_(torch.where(skipped.to(stored.device), stored, new))
        self.forget()

    def _estimate(self, valid: Tensor) -> None:
        assert isinstance(self._optimizer, RuleOptimizer)
        self._not_finite = self._norm() * 0
        for parameter in self._with_gradients():
            own = _gradient(parameter)
            self._optimizer.curvature[parameter] = own.square().mul_(valid.to(own.device, own.dtype))
        self._clear()

    def _ascend(self) -> None:
        assert isinstance(self._rule, SamUpdate)
        norm = self._norm()
        self._not_finite = norm * 0
        factor = self._rule.options.rho / (norm + NORM_EPS)
        for parameter in self._with_gradients():
            weight, gradient = local_part(parameter).detach(), _gradient(parameter)
            self._weights[parameter] = weight.clone()
            if self._rule.looks:
                self._first[parameter] = gradient.clone()
            weight.add_(gradient * to_device(factor, weight.device))
        self._clear()
        self._moved()

    def _descend(self) -> None:
        for parameter, weight in self._weights.items():
            local_part(parameter).detach().copy_(weight)
        self._weights = {}
        self._moved()
        if self._first:
            second = {parameter: _gradient(parameter) for parameter in self._with_gradients()}
            # The part of the second gradient along the first, which every step has anyway.
            along = _dot(self._first, second) / (_dot(self._first, self._first) + NORM_EPS)
            for parameter, gradient in second.items():
                first = self._first[parameter]
                self._directions[parameter] = gradient - first * to_device(along, first.device)

    def _add_direction(self, alpha: float) -> None:
        directions = {p: local_part(self._optimizer.state[p][DIRECTION]) for p in self._with_gradients()}
        length = _dot(directions, directions).sqrt()
        factor = alpha * self._norm() / (length + NORM_EPS)
        for parameter, direction in directions.items():
            gradient = _gradient(parameter)
            gradient.add_(direction * to_device(factor, gradient.device))

    def _with_gradients(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.grad is not None]

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part, live."""
    assert parameter.grad is not None
    return local_part(parameter.grad).detach()


def _dot(one: Mapping[nn.Parameter, Tensor], other: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Sum of the products of all elements, 0-dim in their dtype, equal on all ranks; collective if some are split."""
    parts = []
    split = [parameter for parameter in one if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in one if not isinstance(parameter, DTensor)]
    for kind in filter(None, (split, whole)):
        parts.append(torch.stack([(one[p].double() * other[p].double()).sum() for p in kind]).sum())
        if kind is split:
            mesh = split[0].device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            dist.all_reduce(parts[-1], group=mesh.get_group("shard"))
    total = torch.stack([to_device(part, parts[-1].device) for part in parts]).sum()
    return total.to(next(iter(one.values())).dtype)
