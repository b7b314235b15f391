"""mHC: copies of the stream that doubly stochastic matrices mix (Xie et al. 2025)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import ABOVE_0, AT_LEAST_1, Range, key
from stablelm.methods.axes import Added, Array, Method, MethodOptions, Model, Stream, added_map
from stablelm.methods.hyper_connections import SCALE, CopiedStream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class MhcOptions(MethodOptions):
    """Options of stream: mhc."""

    SECTION: ClassVar[str] = "mhc"

    expansion: int = key(
        4, "number of copies of the stream", identity=True, range=Range("at least 2", lambda v: v >= 2)
    )
    iterations: int = key(20, "Sinkhorn-Knopp iterations", identity=True, range=AT_LEAST_1)
    exchange: float = key(
        0.01,
        "share of the other copies in each copy after a sub-layer, at the start",
        identity=True,
        range=Range(f"{ABOVE_0.words} and below 1", lambda v: 0 < v < 1),
    )


@dataclass(frozen=True)
class ManifoldHyperConnections(CopiedStream):
    """x <- H_res x + H_post f(H_pre x): H_res doubly stochastic, H_pre and H_post not negative (equations 3 to 9).

    Each is made of constants and of a map of all copies together, whose weight starts small.
    """

    name: ClassVar[str] = "mhc"

    iterations: int = 20

    def expansion(self, model: Model) -> int:
        return model.option(MhcOptions).expansion

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        return replace(super().at(model), iterations=model.option(MhcOptions).iterations)

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """Ours, the paper gives the gating factors alone: maps at zero, half of what is read is copy k mod n and half
        the mean, every copy gets the whole branch, and of `exchange` it is the others'."""
        options = model.option(MhcOptions)
        n = options.expansion
        read = 0.5 * np.eye(n)[sublayer % n] + 0.5 / n
        diagonal = math.log((1 - options.exchange) * (n - 1) / options.exchange)
        return (
            Added("static_read", _logit(read)),
            Added("static_mix", (diagonal * np.eye(n)).flatten()),
            Added("static_write", np.zeros(n)),
            added_map("dynamic_map", (n * model.d_model, n * n + 2 * n)),  # columns: read, write, mix
            Added("dynamic_scales", np.full(3, SCALE)),
        )

    def modelling(self, model: Model) -> dict[str, Any]:
        options = model.option(MhcOptions)
        more = {"copies_iterations": options.iterations, "copies_exchange": options.exchange}
        return super().modelling(model) | more

    def read(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        import torch

        h, n = chunks[0], self.copies
        weights = self._logits(h, added, "static_read", slice(0, n), 0).sigmoid()
        return torch.einsum("...n,...nd->...d", weights, h)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        import torch

        h, n = chunks[0], self.copies
        write = 2 * self._logits(h, added, "static_write", slice(n, 2 * n), 1).sigmoid()
        logits = self._logits(h, added, "static_mix", slice(2 * n, None), 2).unflatten(-1, (n, n))
        mixed = torch.matmul(doubly_stochastic(logits, self.iterations), h)
        return (mixed + write.unsqueeze(-1) * branch.to(h.dtype).unsqueeze(-2),)

    def _logits(self, h: "Tensor", added: Mapping[str, "Tensor"], static: str, columns: slice, scale: int) -> "Tensor":
        """a RMSNorm(vec(h)) W + b for some columns of W, in h's dtype: (batch, seq, columns) (equation 7)."""
        import torch

        flat, weight = h.flatten(-2), added["dynamic_map"][:, columns]
        inverse = (flat.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        found = torch.matmul((flat * inverse).to(weight.dtype), weight).to(h.dtype)
        return added["dynamic_scales"][scale].to(h.dtype) * found + added[static].to(h.dtype)


def doubly_stochastic(logits: "Tensor", iterations: int) -> "Tensor":
    """exp of (..., n, n), its columns and then its rows divided by their sums, again and again (equation 9).

    For gradients the steps are computed again: kept, they would be larger than what they mix.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled() or not logits.requires_grad:
        return _sinkhorn(logits, iterations)
    made = checkpoint(_sinkhorn, logits, iterations, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(made, torch.Tensor)
    return made


def _sinkhorn(logits: "Tensor", iterations: int) -> "Tensor":
    """In logarithms, where nothing underflows to a sum of zero."""
    for _ in range(iterations):
        logits = logits.log_softmax(dim=-2).log_softmax(dim=-1)
    return logits.exp()


def _logit(share: Array) -> Array:
    return np.log(share / (1 - share))


MHC = Method(
    "mhc",
    "Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025",
    {"stream": "mhc"},
    (ManifoldHyperConnections(),),
    (MhcOptions,),
)
