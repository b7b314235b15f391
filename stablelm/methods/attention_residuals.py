"""Attention residuals: each sub-layer reads a softmax average of all earlier outputs (Kimi Team 2026)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import AT_LEAST_1, key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, Refusal, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class AttentionResidualsOptions(MethodOptions):
    """Options of stream: depth_attention."""

    SECTION: ClassVar[str] = "attention_residuals"

    block_size: int = key(
        1,
        "sub-layers whose outputs are summed to one source of the average; 1: each is a source of its own",
        identity=True,
        range=AT_LEAST_1,
    )


@dataclass(frozen=True)
class AttentionResiduals(Stream):
    """What the next sub-layer reads, the sum of the block that is not full yet, the embedding, and the full blocks.

    A sub-layer holds the query of what is read after it; the first one reads the embedding, the only source so far.
    """

    name: ClassVar[str] = "depth_attention"
    layers_differ: ClassVar[bool] = True

    opens: bool = True
    """Whether the sub-layer is the first of its block."""
    closes: bool = True
    """Whether it is the last one."""
    eps: float = 0.0

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        if sublayer is None:
            return replace(self, eps=model.norm_eps)
        size = model.option(AttentionResidualsOptions).block_size
        return replace(self, opens=sublayer % size == 0, closes=(sublayer + 1) % size == 0, eps=model.norm_eps)

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """Queries start at zero, so that the average is a plain one (section 5)."""
        return (Added("depth_query", np.zeros(model.d_model)), Added("depth_gain", np.ones(model.d_model)))

    def gains_at_start(self, model: Model, sublayer: int) -> tuple[float, float]:
        """The means h_s = X_s / m_s of m_s sources with the sum X_s: h <- (m_s h + f) / m_(s+1)."""
        before, after = (sources(model, index) for index in (sublayer, sublayer + 1))
        return before / after, 1 / after

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded, embedded, embedded)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        branch = branch.to(chunks[0].dtype)
        total = branch if self.opens else chunks[1] + branch
        read = self._average((*chunks[2:], total), added)
        return (read, total, total) if self.closes else (read, total)

    def _average(self, sources: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        """sum_i softmax_i(w . RMSNorm(v_i)) v_i, without a scale (equations 2 to 6 and figure 2)."""
        import torch

        query = (added["depth_query"] * added["depth_gain"]).to(sources[0].dtype)
        logits = [
            (v @ query) * (v.square().mean(dim=-1) + self.eps).rsqrt()  # (batch, seq)
            for v in sources
        ]
        weights = torch.stack(logits, dim=-1).softmax(dim=-1)
        found = torch.zeros_like(sources[0])
        for weight, v in zip(weights.split(1, dim=-1), sources, strict=True):
            found = found.addcmul(v, weight)
        return found

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        return (*new[:2], *chunks[2:], *new[2:])

    def state_gradient(self, gradients: "Chunks") -> "Chunks":
        """A shift of the mean shifts every source of it."""
        return (sum(gradients[1:], gradients[0]),)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.axes.placement.after_write:
            yield Refusal(
                ("model.stream", "model.placement"),
                "a norm after the sum would normalise an average and its sources alike; "
                "use model.placement=pre, sub or peri",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its sub-layers read softmax averages of all earlier outputs, which no standard architecture does"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"depth_block": model.option(AttentionResidualsOptions).block_size}

    def import_obstacle(self, model: Model) -> str:
        return "its sub-layers read averages of earlier outputs, and a plain model's read sums"


def sources(model: Model, sublayer: int) -> int:
    """What a sub-layer's input is an average of: the embedding, the full blocks, and the one begun if there is any."""
    full, begun = divmod(sublayer, model.option(AttentionResidualsOptions).block_size)
    return 1 + full + (begun > 0)


ATTENTION_RESIDUALS = Method(
    "attention_residuals",
    "Kimi Team, Attention Residuals, 2026",
    {"stream": "depth_attention", "norm": "rmsnorm"},
    (AttentionResiduals(),),
    (AttentionResidualsOptions,),
)
