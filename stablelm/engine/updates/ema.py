"""The exponential moving average of the weights (`train.ema`), a tensor of state beside the optimizer's."""

import torch
from torch import Tensor

from stablelm.engine.tensor_parts import local_part

EMA = "ema"
WARM_UP = 9.0
"""The new weights' share of the average is at least 9 / (10 + t): the first weights are soon forgotten."""


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, skipped: Tensor) -> None:
    """average += (weights - average) (1 - d), d = min(decay, (1 + t) / (10 + t)) after t updates; none if `skipped`."""
    for parameter, state in optimizer.state.items():  # DeepSpeed empties the groups of parameters
        weights, average = local_part(parameter).detach(), local_part(state[EMA])
        share = (WARM_UP / (10.0 + state["step"])).clamp(min=1 - decay).to(weights.device, weights.dtype)
        average.lerp_(weights, share * (1 - skipped.to(weights.device, weights.dtype)))
