"""Global norm, clipping and averaging of gradients of which some are split over ranks and some whole on each."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def total_norm(module: nn.Module) -> Tensor:
    """Norm of all gradients together: 0-dim, equal on all ranks; a collective where there are split ones."""
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in _kinds(module)]
    plain = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(plain)) if len(plain) > 1 else plain[0]


def refused(norm: Tensor, largest: float = math.inf) -> Tensor:
    """Whether an update is left out, 0-dim bool: its gradient's norm is not finite or above `largest`; no host sync."""
    return torch.logical_not(norm <= min(largest, torch.finfo(norm.dtype).max))


def clip(module: nn.Module, largest: float, norm: Tensor) -> None:
    """Scales the gradients, of which `norm` is the global norm, so that it is at most `largest`."""
    for kind in _kinds(module):
        torch.nn.utils.clip_grads_with_norm_(kind, largest, norm)


def norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each gradient, 0-dim fp64 on the CPU, equal on all ranks; one collective if there are split ones."""
    split = {name: gradient for name, gradient in gradients.items() if isinstance(gradient, DTensor)}
    squares = {
        name: (gradient.to_local() if isinstance(gradient, DTensor) else gradient).double().square().sum()
        for name, gradient in gradients.items()
    }
    if split:
        # Copies of the model hold the same parts, so only one copy's are added up.
        summed = torch.stack([squares[name] for name in split])
        dist.all_reduce(summed, group=next(iter(split.values())).device_mesh.get_group("shard"))
        squares |= dict(zip(split, summed.unbind(), strict=True))
    return {name: square.sqrt().cpu() for name, square in squares.items()}


def average(parameters: list[nn.Parameter], world_size: int) -> None:
    """Averages over all ranks the gradients of parameters that are whole on each, in one collective."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _kinds(module: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters with a gradient: split ones and whole ones apart, for no kernel takes both."""
    split: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.grad is not None:
            (split if isinstance(parameter, DTensor) else whole).append(parameter)
    return [kind for kind in (split, whole) if kind]
