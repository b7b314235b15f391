"""Rotary positions (Su et al. 2021), in the half-rotation layout: feature i pairs with i + d_head/2."""

import torch
from torch import Tensor

Rotation = tuple[Tensor, ...]


def rotation_table(seq_len: int, d_head: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Rotation:
    """(cos, sin), each (seq_len, 1, d_head / 2), of position * base^(-2i / d_head); angles are taken in fp64."""
    assert d_head % 2 == 0, "rotary positions pair features, so the width of a head is even"
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64, device=device) / d_head
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of features of x: (batch, seq, heads, d_head) by its position's angle, in the table's dtype."""
    cos, sin = rotation
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
