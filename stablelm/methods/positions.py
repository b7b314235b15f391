"""Positions: rotary (Su et al. 2021, in the half-rotation layout), learned, and none beside the causal mask."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.axes import Model, Position
from stablelm.theory.attention import Pattern, causal_pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stablelm.methods.axes import Chunks


# One object for all layers: the theory keeps its tables by identity.
@lru_cache(maxsize=4)
def _rotary_pattern(width: int, base: float, seq_len: int) -> Pattern:
    return replace(causal_pattern(seq_len), rotary=base ** (-np.arange(0, width, 2, dtype=np.float64) / width))


def rotation_table(seq_len: int, d_head: int, base: float, *, dtype: "torch.dtype", device: "torch.device") -> "Chunks":
    """(cos, sin), each (seq_len, 1, d_head / 2), of position * base^(-2i / d_head); angles are taken in fp64.

    Feature i of a head pairs with i + d_head / 2.
    """
    import torch

    assert d_head % 2 == 0, "rotary positions pair features, so the width of a head is even"
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64, device=device) / d_head
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: "Tensor", rotation: "Chunks") -> "Tensor":
    """Turns each pair of features of x: (batch, seq, heads, d_head) by its position's angle, in the table's dtype."""
    from stablelm.methods.kernels import turned

    return turned(x, *rotation[:2])


@dataclass(frozen=True)
class NoPosition(Position):
    """Order enters by the causal mask alone."""

    name: ClassVar[str] = "none"
    standard: ClassVar[str | None] = "causal"


@dataclass(frozen=True)
class Learned(Position):
    """A table of model.max_seq_len rows, added to the embeddings."""

    name: ClassVar[str] = "learned"
    standard: ClassVar[str | None] = "table"
    adds_table: ClassVar[bool] = True


@dataclass(frozen=True)
class Rope(Position):
    """Queries and keys turned by an angle that grows with their position."""

    name: ClassVar[str] = "rope"
    standard: ClassVar[str | None] = "rotary"
    pairs_features: ClassVar[bool] = True

    def tables(self, model: Model, seq_len: int, d_head: int, **where: Any) -> "Chunks":
        return rotation_table(seq_len, d_head, model.attention.rope_base, **where)

    def turn(self, x: "Tensor", tables: "Chunks") -> "Tensor":
        return rotate(x, tables)

    def pattern(self, model: Model, seq_len: int, d_head: int) -> Pattern:
        return _rotary_pattern(d_head, model.attention.rope_base, seq_len)


POSITIONS = (Rope(), Learned(), NoPosition())
