"""AdamW with decay by role, its state present from the start so that every checkpoint has the same tensors."""

import torch
from torch import nn

from stablelm.config.schema import TrainConfig
from stablelm.methods.initialise import Role, decays


def adamw(parameters: dict[str, nn.Parameter], roles: dict[str, Role], train: TrainConfig) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019, alg. 2) on matrices, none on the rest.

    Moments have the parameters' dtype; `step` is a 0-dim float32 tensor for each parameter.
    """
    decayed = [p for name, p in parameters.items() if decays(roles[name])]
    others = [p for name, p in parameters.items() if not decays(roles[name])]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.lr, betas=train.betas, eps=train.eps, fused=True
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            # The fused kernel wants the count beside the parameter.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
        }
    return optimizer
