"""The tensors of state of a parameter, for every optimizer: which there are, their shapes, bytes and first values."""

import math

import torch
from torch import Tensor

from stablelm.config.schema import TrainConfig
from stablelm.engine.updates.ema import EMA
from stablelm.engine.updates.moments import bytes_of_moments, empty_moments, moment_shapes
from stablelm.methods.roles import MATRICES, Role
from stablelm.optimizers import catalogue
from stablelm.optimizers.interface import StateTensor

STEP = "step"


def is_hidden(role: Role) -> bool:
    """Whether a parameter is a matrix of the layers."""
    return role.layer is not None and role.kind in MATRICES


def own_states(train: TrainConfig, *, hidden: bool) -> dict[str, StateTensor]:
    """State that is not among the moments of torch's AdamW (`updates.moments`), by name."""
    found = catalogue.find(train).states(hidden=hidden)
    if catalogue.fused(train):
        found = {name: each for name, each in found.items() if not name.startswith("exp_avg")}
    return found | ({EMA: StateTensor(from_weights=True)} if train.ema else {})


def state_shapes(shape: tuple[int, ...], train: TrainConfig, *, hidden: bool) -> dict[str, torch.Size]:
    """The shape of every tensor of state of a parameter, by name, the count of its updates among them."""
    found = moment_shapes(shape, train.moments) if catalogue.fused(train) else {}
    for name, each in own_states(train, hidden=hidden).items():
        found[name] = torch.Size(() if each.single else shape)
    return found | {STEP: torch.Size()}


def state_bytes(shape: tuple[int, ...], train: TrainConfig, width: int, *, hidden: bool) -> int:
    """Of the tensors of a parameter with `width` bytes an element; single values do not count."""
    found = bytes_of_moments(shape, train.moments, width) if catalogue.fused(train) else 0
    for name, each in own_states(train, hidden=hidden).items():
        found += 0 if each.single else math.prod(shape) * (2 if _rounded(name, each, train) else width)
    return found


def empty_state(parameter: Tensor, train: TrainConfig, *, hidden: bool) -> dict[str, Tensor]:
    """Before the first step, laid out over ranks like the parameter; what starts as weights has theirs."""
    # The fused kernel wants the count beside the parameter.
    found = {STEP: torch.zeros((), dtype=torch.float32, device=parameter.device)}
    if catalogue.fused(train):
        found |= empty_moments(parameter, train.moments)
    for name, each in own_states(train, hidden=hidden).items():
        if each.single:
            found[name] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            continue
        dtype = torch.bfloat16 if _rounded(name, each, train) else parameter.dtype
        like = parameter.detach()
        found[name] = like.clone() if each.from_weights else torch.zeros_like(like, dtype=dtype)
    return found


@torch.no_grad()
def follow_weights(optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
    """State that starts as weights starts again, of weights that were set."""
    own = own_states(train, hidden=False) | own_states(train, hidden=True)
    for parameter, state in optimizer.state.items():  # DeepSpeed empties the groups of parameters
        for name in state.keys() & own.keys():
            if own[name].from_weights:
                state[name].copy_(parameter.detach())


def _rounded(name: str, each: StateTensor, train: TrainConfig) -> bool:
    return train.moments == "bf16" and name != EMA and not each.single
