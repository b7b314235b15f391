"""AdamW with rates and decay by role; its state is there from the start, so every checkpoint has the same tensors."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stablelm.config.schema import ModelConfig, TrainConfig
from stablelm.methods.initialise import Role, decays
from stablelm.methods.rates import Rates, rates


def adamw(
    parameters: dict[str, nn.Parameter], roles: dict[str, Role], train: TrainConfig, model: ModelConfig
) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019, alg. 2) on matrices, none on the rest.

    A group's `lr_scale` multiplies the step's learning rate (`set_learning_rate`). Moments have the parameters'
    dtype; `step` is a 0-dim float32 tensor for each parameter.
    """
    groups: dict[tuple[Rates, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        role = roles[name]
        factors = rates(model, in_layer=role.layer is not None, matrix=parameter.ndim == 2)
        # One kernel call takes split parameters or whole ones, not both.
        groups.setdefault((factors, decays(role), isinstance(parameter, DTensor)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": members,
                "lr_scale": factors.lr,
                "weight_decay": train.weight_decay * factors.weight_decay * decayed,
                "eps": train.eps * factors.eps,
            }
            for (factors, decayed, _), members in groups.items()
        ],
        lr=train.lr,
        betas=train.betas,
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            # The fused kernel wants the count beside the parameter.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step: `lr` times each group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
