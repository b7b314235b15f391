"""What a body continues from, made map by map."""

import torch
from torch import Tensor

from stablelm.model.attention.body import Attention
from stablelm.model.feedforward import FeedForward


def first_products(body: Attention | FeedForward, x: Tensor, gain: float = 1.0) -> tuple[Tensor, ...]:
    """The arguments of a body whose sub-layer reads x (batch, seq, width); `gain` multiplies what its first map makes.

    The maps are applied one by one, which the model does not do.
    """
    first, *rest = (linear(x) for linear in body.first_maps)
    return torch.cat([gain * first, *rest], dim=-1).split(body.first_widths, dim=-1)
