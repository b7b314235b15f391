"""Positions: rotary (Su et al. 2021), in the half-rotation layout, and ALiBi's biases (Press et al. 2022)."""

import torch
from torch import Tensor

from stablelm.methods.alibi import alibi_slopes

Positions = tuple[Tensor, ...]
"""What every attention body needs of the positions: (cos, sin) for rope, else nothing; then what documents or alibi
add: a bias on the logits, (heads, seq, seq) or (batch, heads or 1, seq, seq), or int32 boundaries of documents."""


def rotation_table(seq_len: int, d_head: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Positions:
    """(cos, sin), each (seq_len, 1, d_head / 2), of position * base^(-2i / d_head); angles are taken in fp64.

    Feature i of a head pairs with i + d_head / 2.
    """
    assert d_head % 2 == 0, "rotary positions pair features, so the width of a head is even"
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64, device=device) / d_head
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Positions) -> Tensor:
    """Turns each pair of features of x: (batch, seq, heads, d_head) by its position's angle, in the table's dtype."""
    cos, sin = rotation[:2]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def beside_rotation(positions: Positions) -> Tensor | None:
    """The bias or the boundaries of documents, if there are any."""
    return positions[-1] if len(positions) % 2 else None


def of_part(positions: Positions, rows: slice, heads: slice) -> Positions:
    """The positions of some rows and heads of a batch."""
    bias = beside_rotation(positions)
    if bias is None:
        return positions
    if bias.ndim == 3:
        return (*positions[:-1], bias[heads])
    return (*positions[:-1], bias[rows, heads if bias.shape[1] > 1 else slice(None)])


def alibi_bias(seq_len: int, n_heads: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n_heads, seq_len, seq_len): -slope (i - j) for keys j up to query i, -inf after it."""
    slopes = torch.tensor(alibi_slopes(n_heads), dtype=torch.float64, device=device)
    place = torch.arange(seq_len, dtype=torch.float64, device=device)
    distance = place[:, None] - place
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf).to(dtype)
