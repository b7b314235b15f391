"""ALiBi: biases on the logits that fall with distance (Press et al., Train Short, Test Long, ICLR 2022)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.axes import Model, Position
from stablelm.theory.attention import Pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST_KERNEL = 512


def alibi_slopes(n_heads: int) -> list[float]:
    """Slope of each head: 2^(-8 h / n) for n a power of two, else those of the next smaller power and, between
    them, every other one of twice that power (released code)."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return slopes + between[: n_heads - power]


def _slopes(n_heads: int, device: "torch.device") -> "Tensor":
    """`alibi_slopes` as float64, made on the device: a copy to it would wait."""
    import torch

    power = 2 ** math.floor(math.log2(n_heads))
    head = torch.arange(n_heads, dtype=torch.float64, device=device)
    return torch.exp2(torch.where(head < power, -8 * (head + 1), -4 * (2 * (head - power) + 1)) / power)


def alibi_bias(seq_len: int, n_heads: int, *, dtype: "torch.dtype", device: "torch.device") -> "Tensor":
    """(n_heads, seq_len, seq_len): -slope (i - j) for keys j up to query i, -inf after it."""
    import torch

    return _bias(torch.arange(seq_len, device=device), seq_len, n_heads, dtype)


def _bias(places: "Tensor", length: int, n_heads: int, dtype: "torch.dtype") -> "Tensor":
    """(..., n_heads, queries, length) for queries at `places`, (..., queries)."""
    import torch

    distance = places.double()[..., None, :, None] - torch.arange(length, dtype=torch.float64, device=places.device)
    bias = -_slopes(n_heads, places.device)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf).to(dtype)


# One object for all layers: the theory keeps its tables by identity.
@lru_cache(maxsize=4)
def _pattern(n_heads: int, seq_len: int) -> Pattern:
    distance = np.subtract.outer(np.arange(seq_len), np.arange(seq_len)).astype(np.float64)
    bias = -np.array(alibi_slopes(n_heads))[:, None, None] * distance
    return Pattern(np.where(distance >= 0, bias, -np.inf))


def _decaying_weights(slope: float, seq_len: int, q: float) -> tuple[float, float]:
    """`Position.mean_weights` for weights exp(-slope distance); the annealed spread of iid Gaussian logits on top."""
    distance = np.subtract.outer(np.arange(seq_len), np.arange(seq_len))
    weights = np.where(distance >= 0, np.exp(-slope * np.abs(distance)), 0.0)
    first, second = weights.sum(axis=1), (weights**2).sum(axis=1)
    own = math.exp(q) * second / (first**2 + math.expm1(q) * second)
    mean = weights / first[:, None]
    overlap = mean @ mean.T
    below = np.tril_indices(seq_len, -1)
    return float(own.mean()), float(overlap[below].mean()) if seq_len > 1 else 1.0


@dataclass(frozen=True)
class Alibi(Position):
    name: ClassVar[str] = "alibi"
    biases_logits: ClassVar[bool] = True

    def bias(self, model: Model, seq_len: int, **where: Any) -> "Tensor":
        return alibi_bias(seq_len, model.n_heads, **where)

    def slopes(self, model: Model, **where: Any) -> "Tensor":
        return _slopes(model.n_heads, where["device"]).to(where["dtype"])

    def bias_at(self, model: Model, places: "Tensor", length: int, **where: Any) -> "Tensor":
        return _bias(places, length, model.n_heads, where["dtype"])

    def pattern(self, model: Model, seq_len: int, d_head: int) -> Pattern:
        return _pattern(model.n_heads, seq_len)

    def mean_weights(self, model: Model, q: float) -> tuple[float, float]:
        assert model.max_seq_len is not None
        length = min(model.max_seq_len, LONGEST_KERNEL)
        both = [_decaying_weights(slope, length, q) for slope in alibi_slopes(model.n_heads)]
        own, shared = (sum(values) / len(both) for values in zip(*both, strict=True))
        return own, shared

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"alibi_slopes": alibi_slopes(model.n_heads)}
