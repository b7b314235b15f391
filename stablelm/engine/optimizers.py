"""From gradients to an update: global norm, clipping and averaging, and optimizers with rates and decay by role.

Some gradients are split over ranks and some whole on each. The optimizer's state is there from the start, so every
checkpoint has the same tensors.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stablelm.config.schema import ModelConfig, TrainConfig
from stablelm.engine.tensor_parts import local_part
from stablelm.engine.updates.moments import CompactAdamW
from stablelm.engine.updates.rule_optimizer import RuleOptimizer
from stablelm.engine.updates.state import empty_state, is_hidden
from stablelm.methods.axes import Rates, Role
from stablelm.model.devices import to_device
from stablelm.model.initialise import decays
from stablelm.optimizers import catalogue
from stablelm.private_names import multiply_all, norms_of

ROW = 4096
"""Elements that one fp32 sum takes on a CPU, whose kernels add up one after the other: a long sum loses digits."""


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, 0-dim in their dtype, within 1e-6 of the exact one, equal on all ranks.

    A collective where there are split gradients.
    """
    split, whole = _kinds(parameters)
    parts: list[Tensor] = []
    if split:
        parts.append(squared_norm([local_part(gradient) for gradient in split]))
        dist.all_reduce(parts[0], group=_shard_group(split[0]))
    if whole:
        parts.append(squared_norm(whole))
    # Offloaded shards have theirs in host memory.
    together = torch.stack([to_device(part, parts[-1].device) for part in parts])
    return together.sum().sqrt().to((split or whole)[0].dtype)


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, 0-dim fp64, beside the first tensor."""
    if not tensors[0].is_cpu:
        return torch.stack(norms_of(tensors)).double().square().sum()
    # Rows of the large ones; one call for all the small ones.
    rows = [tensor.reshape(-1)[: tensor.numel() // ROW * ROW].view(-1, ROW) for tensor in tensors]
    rest = [tensor.reshape(-1)[tensor.numel() // ROW * ROW :] for tensor in tensors]
    norms = [torch.linalg.vector_norm(each, dim=1) for each in rows if len(each)]
    norms.append(torch.stack(norms_of(rest)))
    return torch.cat(norms).double().square().sum()


def refused(norm: Tensor, largest: float = math.inf) -> Tensor:
    """Whether an update is skipped, 0-dim bool: its gradient's norm is not finite or above `largest`; no host sync."""
    return torch.logical_not(norm <= min(largest, torch.finfo(norm.dtype).max))


def clip(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scales the gradients, of which `norm` is the global norm, so that it is at most `largest`."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for kind in filter(None, _kinds(parameters)):
        gradients = [local_part(gradient) for gradient in kind]
        multiply_all(gradients, to_device(factor, gradients[0].device))


def norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each gradient, 0-dim fp64 on the CPU, equal on all ranks; one collective if there are split ones."""
    found: dict[str, Tensor] = {}
    for is_split in (True, False):
        kind = {name: gradient for name, gradient in gradients.items() if isinstance(gradient, DTensor) == is_split}
        if kind:
            squares = torch.stack([local_part(gradient).double().square().sum() for gradient in kind.values()])
            if is_split:
                # Copies of the model hold the same parts, so only one copy's are added up.
                dist.all_reduce(squares, group=_shard_group(next(iter(kind.values()))))
            found |= dict(zip(kind, squares.sqrt().cpu().unbind(), strict=True))
    return {name: found[name] for name in gradients}


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


def _kinds(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients there are: those split over ranks, and those that each rank has whole."""
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (split if isinstance(parameter, DTensor) else whole).append(parameter.grad)
    return split, whole


def _shard_group(gradient: Tensor) -> dist.ProcessGroup:
    """The ranks that hold the parts of one copy."""
    assert isinstance(gradient, DTensor)
    return gradient.device_mesh.get_group("shard")


def make_optimizer(
    parameters: dict[str, nn.Parameter], roles: dict[str, Role], train: TrainConfig, model: ModelConfig
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`; decoupled weight decay (Loshchilov and Hutter, 2019, alg. 2) on matrices.

    A group's `lr_scale` multiplies the step's learning rate (`set_learning_rate`), its `decay_scale` the decay
    (`set_weight_decay`); `hidden`: whether its parameters are matrices of the layers. State has the parameters' dtype
    or is as `train.moments` says; `step` is a 0-dim float32 tensor for each parameter.
    """
    groups: dict[tuple[Rates, bool, bool, bool], list[nn.Parameter]] = {}
    of_layers: dict[nn.Parameter, bool] = {}
    own_kinds = catalogue.update_name(train) == "muon"
    for name, parameter in parameters.items():
        role = roles[name]
        factors = model.axes.init.rates(model, in_layer=role.layer is not None, matrix=parameter.ndim == 2)
        of_layers[parameter] = own_kinds and is_hidden(role)
        # One kernel call takes split parameters or whole ones, not both.
        kind = (factors, decays(role), of_layers[parameter], isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    listed = [
        {
            "params": members,
            "lr_scale": factors.lr * (train.muon.lr_factor if hidden else 1.0),
            "decay_scale": factors.weight_decay * decayed,
            "weight_decay": decay_now(train) * factors.weight_decay * decayed,
            "eps": train.eps * factors.eps,
            "hidden": hidden,
        }
        for (factors, decayed, hidden, _), members in groups.items()
    ]
    if catalogue.fused(train):
        fused = torch.optim.AdamW if train.moments == "fp32" else CompactAdamW
        optimizer = fused(listed, lr=train.lr, betas=train.betas, fused=True)
    else:
        optimizer = RuleOptimizer(listed, catalogue.find(train), lr=train.lr, betas=train.betas)
    for parameter, hidden in of_layers.items():
        optimizer.state[parameter] = empty_state(parameter, train, hidden=hidden)
    return optimizer


def decay_now(train: TrainConfig) -> float:
    """The decay that the rate multiplies; independent of the peak rate with `train.independent_decay`."""
    return train.weight_decay / train.lr if train.independent_decay else train.weight_decay


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step: `lr` times each group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """The decay from the next step on: `decay` times each group's scale."""
    for group in optimizer.param_groups:
        group["weight_decay"] = decay * group["decay_scale"]
