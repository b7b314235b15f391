"""What multiplies each branch of a model that leaves some out at random: apart, since training steps draw it."""

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.model.linear import Dtypes
from stablelm.seeds import seed_from

UNIT = 2.0**-63
"""Of the seeds, which are below 2^63."""


def drawn(config: ModelConfig, dtypes: Dtypes, seed: int, step: int) -> Tensor | None:
    """Of a training step, (n_layers, 2) on the CPU: 0 for a branch that is left out.

    None where no branch ever is. Each draw depends on these numbers and its layer alone.
    """
    drop = config.axes.depth_drop
    if not drop.active:
        return None
    kept = []
    for sublayer in range(2 * config.n_layers):
        unit = sublayer // 2 if drop.draws_layers(config) else sublayer
        chance = UNIT * seed_from("depth_drop", seed, step, unit)
        kept.append(drop.trained(config, sublayer) if chance < drop.survival(config, sublayer) else 0.0)
    return torch.tensor(kept, dtype=dtypes.parameter).view(-1, 2)


def usual(config: ModelConfig, dtypes: Dtypes, *, training: bool) -> Tensor | None:
    """Of a pass that is no training step's, (n_layers, 2) on the CPU: every branch is there.

    In training mode each has the root mean square of its factor, so that it has the size it has on average.
    """
    drop = config.axes.depth_drop
    if not drop.active:
        return None
    factor = drop.root_mean_square if training else drop.evaluated
    found = [factor(config, sublayer) for sublayer in range(2 * config.n_layers)]
    return None if set(found) == {1.0} else torch.tensor(found, dtype=dtypes.parameter).view(-1, 2)
