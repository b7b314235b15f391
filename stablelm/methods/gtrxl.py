"""GTrXL: a recurrent unit's gate in place of each skip connection (Parisotto et al., ICML 2020)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import key
from stablelm.methods.axes import Added, Array, Method, MethodOptions, Model, Stream, added_map
from stablelm.theory.gates import GateTheory, gated_sensitivity

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class GtrxlOptions(MethodOptions):
    """Options of stream: gru."""

    SECTION: ClassVar[str] = "gtrxl"

    gate_bias: float = key(2.0, "start of the bias that holds the gates closed", identity=True)


@dataclass(frozen=True)
class GruStream(Stream):
    """(1 - z) x + z h with y = relu(f), r = s(W_r y + U_r x), z = s(W_z y + U_z x - b), h = tanh(W_g y + U_g(r x)).

    Section 3.2, 'Gated-Recurrent-Unit-type gating', and the rectifier of section 3.1 before it.
    """

    name: ClassVar[str] = "gru"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """Matrices of std d_model^-1/2 (ours; the paper does not say), b = 2 (section 4.3.4)."""
        d = model.d_model
        return (
            added_map("gate_branch", (3 * d, d), std=d**-0.5),  # W_r, W_z, W_g
            added_map("gate_stream", (2 * d, d), std=d**-0.5),  # U_r, U_z
            added_map("gate_reset", (d, d), std=d**-0.5),  # U_g
            Added("gate_bias", np.full(d, model.option(GtrxlOptions).gate_bias)),
        )

    def gate(self, model: Model) -> GateTheory:
        return GateTheory(gain=1.0, bias=model.option(GtrxlOptions).gate_bias)

    def sensitivity(self, model: Model, variances: Array, matrices: Array, embedding_variance: float) -> float:
        return gated_sensitivity(self.gate(model), variances, matrices, embedding_variance, model.dropout)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        import torch.nn.functional as F

        x = chunks[0]

        def times(name: str, inputs: "Tensor") -> "Tensor":
            return F.linear(inputs.to(added[name].dtype), added[name]).to(x.dtype)

        reset, update, candidate = times("gate_branch", branch.relu()).chunk(3, dim=-1)
        from_reset, from_update = times("gate_stream", x).chunk(2, dim=-1)
        reset = (reset + from_reset).sigmoid()
        update = (update + from_update - added["gate_bias"].to(x.dtype)).sigmoid()
        candidate = (candidate + times("gate_reset", reset * x)).tanh()
        return (x.lerp(candidate, update),)

    def export_obstacle(self, model: Model) -> str:
        return "its stream passes through gates, which no standard architecture has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"gru_bias": model.option(GtrxlOptions).gate_bias}

    def import_obstacle(self, model: Model) -> str:
        return (
            "its gates mix the stream with a bounded function of the branch, and a plain model adds the branch itself"
        )


GTRXL = Method(
    "gtrxl",
    "Parisotto et al., Stabilizing Transformers for Reinforcement Learning, ICML 2020",
    {"stream": "gru", "activation": "relu"},
    (GruStream(),),
    (GtrxlOptions,),
)
