"""What is measured in a layer and of the stream: functions of tensors, and hooks that call them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions
from stablelm.model.sublayer import Chunks, Layer

LOGITS = 2**20


@dataclass(frozen=True)
class Internals:
    """Figures over depth, float64 (n_layers + 1,): index 0 is the embedding, index i the state after layer i.

    `stream_variance`: mean square of the stream's entries; `*_branch_variance`: the same of a branch as written,
    before its scale (index 0: the stream's); `token_correlation`: see `token_correlation`; `attention_entropy`
    (nats), `logit_max`, `attention_sink`: see `attention_figures` (index 0: zeros); `kurtosis`: see that function;
    `angular_distance`: of the stream before a layer and after it (index 0: zero), see that function; `gradient_norm`:
    Euclidean norm of the mean loss's gradient to the stream through later layers; `weight_gradient_norm`: of its
    gradient to the layer's matrices together (index 0: the embedding table).
    """

    stream_variance: np.ndarray
    token_correlation: np.ndarray
    kurtosis: np.ndarray
    angular_distance: np.ndarray
    attention_branch_variance: np.ndarray
    feedforward_branch_variance: np.ndarray
    attention_entropy: np.ndarray
    logit_max: np.ndarray
    attention_sink: np.ndarray
    gradient_norm: np.ndarray
    weight_gradient_norm: np.ndarray

    @property
    def branch_variance(self) -> np.ndarray:
        """Mean of the two branches of a layer."""
        return (self.attention_branch_variance + self.feedforward_branch_variance) / 2


def internals(rows: list[dict[str, Tensor]], gradients: list[Tensor], weight_gradients: list[Tensor]) -> Internals:
    """From 0-dim tensors: `rows` holds `stream_figures` with a layer's own figures, by index."""
    variance, zero = rows[0]["stream_variance"], torch.zeros_like(rows[0]["stream_variance"])
    first = {"attention_branch_variance": variance, "feedforward_branch_variance": variance}
    first |= dict.fromkeys(("attention_entropy", "logit_max", "attention_sink"), zero)
    rows = [{**first, **rows[0]}, *rows[1:]]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"gradient_norm": gradients, "weight_gradient_norm": weight_gradients}
    # One transfer a column, not one a figure.
    return Internals(**{name: torch.stack(column).double().cpu().numpy() for name, column in columns.items()})


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries together, 0-dim float64: squares of a small gradient vanish in float32."""
    flat = [tensor.detach().flatten() for tensor in tensors]
    return torch.linalg.vector_norm(flat[0] if len(flat) == 1 else torch.cat(flat), dtype=torch.float64)


def mean_square(x: Tensor) -> Tensor:
    """0-dim float64."""
    return norm((x,)).square() / x.numel()


def stream_figures(chunks: Chunks, before: Chunks = ()) -> dict[str, Tensor]:
    """What is measured of the stream, of chunks side by side, (batch, seq, width) each; `before`: of the layer before.

    Without `before` the angular distance is 0.
    """
    x = _together(chunks)
    distance = (
        angular_distance(_together(before), x) if before else torch.zeros((), dtype=torch.float64, device=x.device)
    )
    return {
        "stream_variance": mean_square(x),
        "token_correlation": token_correlation(x),
        "kurtosis": kurtosis(x),
        "angular_distance": distance,
    }


def _together(chunks: Chunks) -> Tensor:
    return (chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)).detach()


def kurtosis(x: Tensor) -> Tensor:
    """How unequal the features are: mean of s^4 over the square of the mean of s^2, 0-dim float64; x: (..., width).

    s is a feature's root mean square over all tokens. 1: all alike; width: one feature has everything (He et al., 2024,
    arXiv 2405.19279, section 2).
    """
    squares = torch.linalg.vector_norm(x.flatten(0, -2), dim=0, dtype=torch.float64).square()
    return squares.square().mean() / squares.mean().square()


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Mean over tokens of the angle between the two in units of pi, 0-dim float64; (batch, seq, width) each.

    0: the layer changes nothing but the length; 0.5: its output is orthogonal to its input (Gromov et al., 2024, arXiv
    2403.17887, section 3.2, who take the last token alone). A narrower `before` lies in the first features.
    """
    width = before.shape[-1]
    products = (before.double() * after[..., :width].double()).sum(dim=-1)
    lengths = (torch.linalg.vector_norm(each, dim=-1, dtype=torch.float64) for each in (before, after))
    one, other = lengths
    cosines = (products / (one * other)).clamp(-1, 1)
    return cosines.acos().mean() / torch.pi


def token_correlation(x: Tensor) -> Tensor:
    """Mean of cos(x_a, x_b) over pairs a != b of the same sequence, 0-dim float64; x: (batch, seq, width).

    From the sum of unit vectors: |sum_a u_a|^2 = sum_a |u_a|^2 + sum_(a != b) u_a u_b. One token has no pairs: nan.
    """
    if x.shape[1] < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)  # (batch, seq)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = lengths.reciprocal().masked_fill(lengths == 0, 0).to(x.dtype)
    sums = torch.einsum("bt,btw->bw", inverse, x)
    pairs = sums.double().square().sum(dim=-1) - (lengths > 0).sum(dim=-1)
    return (pairs / (x.shape[1] * (x.shape[1] - 1))).mean().clamp(max=1)  # rounding of the sums


def attention_figures(attention: Attention, products: tuple[Tensor, ...], positions: Positions) -> dict[str, Tensor]:
    """`attention_entropy`: mean over heads, rows and sequences, nats; `logit_max`: largest |logit| of a visible key;
    `attention_sink`: share of attention that goes to the first token of the sequence, a mean over the same.

    The first token itself has no other choice, so that uniform attention gives the mean of 1/1 ... 1/seq. Logits as the
    softmax sees them, with the biases of positions; `LOGITS` of them at a time, or one head's. Entropy is
    -sum_j w_j ln w_j over the weights of keys, also where these do not sum to 1; what is added to weights afterwards,
    as the identity of shaped attention, does not count.
    """
    query, key = attention.queries_and_keys(products, positions)
    batch, heads, seq_len = query.shape[:3]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    some = max(1, min(heads, LOGITS // seq_len**2))
    rows = max(1, LOGITS // (some * seq_len**2))
    entropy = query.new_zeros((), dtype=torch.float64)
    sink = torch.zeros_like(entropy)
    largest: list[Tensor] = []
    for begin, queries, keys in zip(range(0, batch, rows), query.split(rows), key.split(rows), strict=True):
        for first in range(0, heads, some):
            part = slice(first, first + some)
            places = positions.part(slice(begin, begin + rows), part)
            logits = attention.logits(queries[:, part], keys[:, part], places)
            weights = attention.weights(logits, part)
            sink += weights[..., 0].sum(dtype=torch.float64)
            # The logarithm of a weight of 0 is made finite.
            logs = weights.log().clamp_(min=torch.finfo(logits.dtype).min)
            entropy -= logs.mul_(weights).sum(dim=-1).sum(dtype=torch.float64)
            largest += logits.masked_fill_(logits == -torch.inf, 0).aminmax()
    return {
        "attention_entropy": entropy / (batch * heads * seq_len),
        "logit_max": torch.stack(largest).abs().amax().double(),
        "attention_sink": sink / (batch * heads * seq_len),
    }


class LayerGauge:
    """Hooks on one layer that keep the figures of its next pass alone, until they are `taken`: recompute makes another.

    `figures`: names of `Internals` to 0-dim tensors. Compiled layers must run eagerly for the hooks to be called.
    """

    def __init__(self, layer: Layer):
        self.figures: dict[str, Tensor] = {}
        self._handles = [
            layer.attention.body.register_forward_pre_hook(self._on_attention),
            layer.attention.dropout.register_forward_hook(self._on_branch("attention_branch_variance")),
            layer.feedforward.dropout.register_forward_hook(self._on_branch("feedforward_branch_variance")),
        ]

    def taken(self) -> dict[str, Tensor]:
        """The figures of the pass that is done; the next ones are of the next pass."""
        figures, self.figures = self.figures, {}
        return figures

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _on_attention(self, attention: Any, arguments: tuple[Any, ...]) -> None:
        if "logit_max" not in self.figures:
            products, positions = arguments
            self.figures |= attention_figures(attention, products, positions)

    def _on_branch(self, name: str):
        @torch.no_grad()
        def keep(dropout: Any, arguments: Any, branch: Tensor) -> None:
            self.figures.setdefault(name, mean_square(branch))

        return keep
