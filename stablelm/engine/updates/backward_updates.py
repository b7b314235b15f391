"""Updates in the backward pass: each parameter as soon as its gradient is there, which is freed then.

The gradients of all parameters are never there together, so that their global norm is known afterwards only: nothing
can be clipped. For one process, whose gradients need no reduction. Where a loss is not finite, nothing is updated;
where a gradient is not finite though the loss is, the parameters that follow in the backward pass keep their values,
and those before it have been updated.
"""

from functools import partial

import torch
from torch import Tensor, nn

from stablelm.engine.updates import moments, rule_optimizer
from stablelm.engine.updates.rule_optimizer import RuleOptimizer


class BackwardUpdates:
    """The updates of `optimizer` by hooks on its parameters, in the passes after `begin` up to `finish`."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer, self._active = optimizer, False
        first = optimizer.param_groups[0]["params"][0]
        self._dtype = first.dtype
        self._squares: list[Tensor] = []
        self._refused = torch.zeros((), dtype=torch.bool, device=first.device)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._updated, group))

    def begin(self, *, updates: bool) -> None:
        """Updates from now on, at the groups' rates; without `updates` gradients are freed and nothing changes."""
        self._active, self._squares = True, []
        self._refused = torch.full_like(self._refused, not updates)

    def check(self, loss: Tensor) -> None:
        """Leaves out the update of a loss that is not finite; called before its backward pass."""
        self._refused |= ~loss.detach().isfinite()

    def _updated(self, group: dict, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        assert parameter.grad is not None
        square = parameter.grad.square().sum(dtype=torch.float64)
        self._squares.append(square)
        self._refused |= ~square.isfinite()
        setattr(self._optimizer, "found_inf", self._refused.float())  # noqa: B010 - torch declares no such attribute
        if isinstance(self._optimizer, RuleOptimizer):
            rule_optimizer.update(self._optimizer, group, [parameter])
        else:
            moments.update(self._optimizer, group, [parameter])
        parameter.grad = None

    def finish(self) -> Tensor:
        """The global norm of all gradients, 0-dim; later passes keep their gradients again."""
        self.stop()
        return torch.stack(self._squares).sum().sqrt().to(self._dtype)

    def stop(self) -> None:
        """Later passes keep their gradients again."""
        self._active = False
