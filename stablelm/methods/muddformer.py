"""MUDDFormer: queries, keys, values and the stream read dynamic sums of all earlier outputs (Xiao et al. 2025)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import AT_LEAST_1, key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, Refusal, Stream, added_map

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

WAYS = 4
"""Sums after a layer: for the residual, and for the queries, keys and values of the next layer."""
LAST = 4
"""Factor of the hidden width after the last layer, which has a single sum (released code)."""


@dataclass(frozen=True)
class MuddformerOptions(MethodOptions):
    """Options of stream: mudd."""

    SECTION: ClassVar[str] = "muddformer"

    dynamic: bool = key(True, "weights also depend on the token; false: they are constants", identity=True)
    hidden_multiple: int = key(
        64,
        "hidden widths of the weights' network are the next larger multiple of it",
        identity=True,
        range=AT_LEAST_1,
    )


@dataclass(frozen=True)
class MultiwayDense(Stream):
    """The residual, the inputs of queries, keys and values, then the embedding and every layer's output."""

    name: ClassVar[str] = "mudd"
    layers_differ: ClassVar[bool] = True

    eps: float = 0.0

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        return replace(self, eps=model.norm_eps)

    def in_layer(self, model: Model, layer: int) -> tuple[Added, ...]:
        """The newest output alone at the start: the network's last matrix is zero, its first has std d_model^-1/2."""
        options, d, last = model.option(MuddformerOptions), model.d_model, layer == model.n_layers - 1
        ways, outputs = 1 if last else WAYS, layer + 2
        static = Added("mix", np.tile(np.eye(outputs)[-1], ways))  # way by way
        if not options.dynamic:
            return (static,)
        hidden = ways * outputs * (LAST if last else 1)
        hidden = (hidden // options.hidden_multiple + 1) * options.hidden_multiple
        return (
            static,
            added_map("mix_hidden", (hidden, d), std=d**-0.5),
            added_map("mix_out", (ways * outputs, hidden)),
        )

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.axes.gate.width(model):
            yield Refusal(
                ("model.stream", "model.attention.gate"),
                "queries, keys and values have inputs of their own here, and the paper names none for a gate; use "
                "model.attention.gate=none",
            )
        if not model.axes.maps.has_values:
            yield Refusal(
                ("model.stream", "model.attention.value_maps"),
                "values have an input of their own here, which needs a map; use model.attention.value_maps=true",
            )

    def separate_inputs(self, model: Model, sublayer: int) -> bool:
        return sublayer % 2 == 0 and sublayer > 0

    def read_each(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        return chunks[1:WAYS]

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded,) * (WAYS + 1)

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        if len(new) == 1:
            return (*new, *chunks[1:])
        return (*new[:WAYS], *chunks[WAYS:], *new[WAYS:])

    def end_layer(self, chunks: "Chunks", new: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        """The sums, and the layer's own output, which later sums read; after the last layer one sum alone."""
        outputs = (*chunks[WAYS:], new[0])
        weights = self._weights(new[0], added).split(len(outputs), dim=-1)
        if len(weights) == 1:
            return (_total(weights[0], outputs),)
        query, key_, value, residual = (_total(each, outputs) for each in weights)
        return residual, query, key_, value, new[0]

    def _weights(self, x: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        """a + W_2 GELU(W_1 RMSNorm(x)) in x's dtype, (batch, seq, sums x outputs); constants alone: (sums x outputs,)
        (section 2.3; the order of the sums is that of the released code: query, key, value, residual)."""
        import torch.nn.functional as F

        static = added["mix"].to(x.dtype)
        if "mix_hidden" not in added:
            return static
        first, last = added["mix_hidden"], added["mix_out"]
        normed = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        hidden = F.gelu(F.linear(normed.to(first.dtype), first))
        return static + F.linear(hidden, last).to(x.dtype)

    def state_gradient(self, gradients: "Chunks") -> "Chunks":
        """All four sums are the newest output at the start."""
        return (sum(gradients[1:WAYS], gradients[0]),)

    def export_obstacle(self, model: Model) -> str:
        return "its layers read weighted sums of all earlier ones, which no standard architecture does"

    def modelling(self, model: Model) -> dict[str, Any]:
        options = model.option(MuddformerOptions)
        hidden = options.hidden_multiple if options.dynamic else None
        return {"mixes_separately": True, "mix_hidden_multiple": hidden}


def _total(weights: "Tensor", outputs: "Chunks") -> "Tensor":
    """weights: (..., outputs), of each token or of all -> the weighted sum of (batch, seq, d_model) each."""
    import torch

    total = torch.zeros_like(outputs[-1])
    for weight, output in zip(weights.split(1, dim=-1), outputs, strict=True):
        total = total.addcmul(output, weight)
    return total


MUDDFORMER = Method(
    "muddformer",
    "Xiao et al., MUDDFormer: Breaking Residual Bottlenecks in Transformers via Multiway Dynamic Dense Connections, "
    "ICML 2025",
    {"stream": "mudd", "norm": "rmsnorm", "activation": "swiglu", "attention.qk_norm": True},
    (MultiwayDense(),),
    (MuddformerOptions,),
)
