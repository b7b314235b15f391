"""Hyper-connections: several copies of the stream, mixed by learned weights (Zhu et al., ICLR 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import AT_LEAST_1, key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, Stream, added_map

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

SCALE = 0.01
"""Start of what multiplies the dynamic parts (section 2.2 and algorithm 2)."""


@dataclass(frozen=True)
class HyperConnectionsOptions(MethodOptions):
    """Options of stream: hyper."""

    SECTION: ClassVar[str] = "hyper_connections"

    expansion: int = key(4, "number of copies of the stream", identity=True, range=AT_LEAST_1)
    dynamic: bool = key(True, "weights also depend on the token; false: they are constants", identity=True)


@dataclass(frozen=True)
class CopiedStream(Stream):
    """A stream of equal copies at the start, one tensor (batch, seq, copies, d_model); the head sees their mean.

    Whatever keeps equal copies equal is a residual stream at the start. The mean is the sum of the paper, with which a
    final norm gives the same but for eps; so logits have their size without a norm, too.
    """

    copies: int = 1
    eps: float = 0.0

    def expansion(self, model: Model) -> int:
        """The number of copies."""
        raise NotImplementedError

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        return replace(self, copies=self.expansion(model), eps=model.norm_eps)

    def multiplications(self, model: Model, sublayer: int) -> int:
        """Reading and mixing, of every feature of every copy."""
        n = self.expansion(model)
        return (n + n * n) * model.d_model

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded.unsqueeze(-2).repeat_interleave(self.copies, dim=-2),)

    def state(self, chunks: "Chunks") -> "Chunks":
        """The mean of the copies, which is each of them at the start."""
        return (chunks[0].mean(dim=-2),)

    def state_gradient(self, gradients: "Chunks") -> "Chunks":
        return (gradients[0].sum(dim=-2),)

    def finish(self, chunks: "Chunks") -> "Tensor":
        return chunks[0].mean(dim=-2)

    def export_obstacle(self, model: Model) -> str:
        return f"its stream is {self.expansion(model)} tensors that learned weights mix, which no standard model has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"copies": self.expansion(model)}


@dataclass(frozen=True)
class HyperConnections(CopiedStream):
    """Copies h_i: the body reads sum_i a_i h_i, and h_j becomes sum_i A_ij h_i + b_j f (equations 1 to 5)."""

    name: ClassVar[str] = "hyper"

    def expansion(self, model: Model) -> int:
        return model.option(HyperConnectionsOptions).expansion

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """As algorithm 2: sub-layer k reads copy k mod n, the copies stay apart, and all get the whole branch."""
        options, d = model.option(HyperConnectionsOptions), model.d_model
        n = options.expansion
        static = (
            Added("static_read", np.eye(n)[sublayer % n]),
            Added("static_mix", np.eye(n).flatten()),
            Added("static_write", np.ones(n)),
        )
        if not options.dynamic:
            return static
        dynamic = (
            Added("dynamic_norm", np.ones(d)),
            added_map("dynamic_map", (d, n + 2)),  # columns: read, mix of n, write
            Added("dynamic_scales", np.full(2, SCALE)),  # of read and mix, and of write
        )
        return static + dynamic

    def modelling(self, model: Model) -> dict[str, Any]:
        return super().modelling(model) | {"copies_dynamic": model.option(HyperConnectionsOptions).dynamic}

    def multiplications(self, model: Model, sublayer: int) -> int:
        """The dynamic map is used by each copy."""
        n, dynamic = self.expansion(model), model.option(HyperConnectionsOptions).dynamic
        return super().multiplications(model, sublayer) + dynamic * (n - 1) * model.d_model * (n + 2)

    def read(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        import torch

        h = chunks[0]
        weights = added["static_read"].to(h.dtype)
        if "dynamic_map" in added:
            weights = weights + self._dynamic(h, added, slice(0, 1), 0).squeeze(-1)
            return torch.einsum("...n,...nd->...d", weights, h)
        return torch.einsum("n,...nd->...d", weights, h)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        import torch

        h, n = chunks[0], self.copies
        mix, write = added["static_mix"].to(h.dtype).unflatten(0, (n, n)), added["static_write"].to(h.dtype)
        if "dynamic_map" in added:
            mix = mix + self._dynamic(h, added, slice(1, n + 1), 0)
            write = write + self._dynamic(h, added, slice(n + 1, n + 2), 1).squeeze(-1)
        mixed = torch.matmul(mix.transpose(-1, -2), h)
        return (mixed + write.unsqueeze(-1) * branch.to(h.dtype).unsqueeze(-2),)

    def _dynamic(self, h: "Tensor", added: Mapping[str, "Tensor"], columns: slice, scale: int) -> "Tensor":
        """s tanh(LN(h) W) for some columns of W: (batch, seq, n, columns) (equations 10 to 13)."""
        import torch
        import torch.nn.functional as F

        weight = added["dynamic_map"][:, columns]
        normed = F.layer_norm(h, h.shape[-1:], added["dynamic_norm"].to(h.dtype), eps=self.eps)
        found = torch.matmul(normed.to(weight.dtype), weight).to(h.dtype)
        return added["dynamic_scales"][scale].to(h.dtype) * found.tanh()


HYPER_CONNECTIONS = Method(
    "hyper_connections",
    "Zhu et al., Hyper-Connections, ICLR 2025",
    {"stream": "hyper"},
    (HyperConnections(),),
    (HyperConnectionsOptions,),
)
