"""nGPT: tokens, hidden states and matrices of length 1 (Loshchilov et al., arXiv 2410.01131, with its equations).

h <- Norm(h + alpha (Norm(f(h)) - h)) (10, 11), with a learned alpha >= 0 for each feature, Norm(x) = x / |x|. Queries
and keys are Norm(q) s_qk, after their positions (15, 16), and the softmax has the scale sqrt(d_head); u <- s_u u and
v <- s_v sqrt(d_model) v in the feed-forward (20, 21); the logits of token t are multiplied by s_z[t] (3). Each of these
vectors is trained as a parameter that starts at `scale` and is multiplied by init / scale (section 2.5). All matrices
have length 1 along the embedding dimension at the start and again after each optimizer step (section 2.6).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import ABOVE_0, Range, key
from stablelm.methods.axes import (
    Added,
    Gains,
    Init,
    Method,
    MethodOptions,
    Model,
    NormKind,
    Placement,
    Refusal,
    Reparam,
    Role,
    Stream,
)
from stablelm.methods.roles import WRITING
from stablelm.methods.sizes import d_head
from stablelm.theory.kernels import NormTheory

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

TINY = 1e-30
RATES = Range("above 0 and at most 1", lambda v: 0 < v <= 1)


@dataclass(frozen=True)
class NgptOptions(MethodOptions):
    """Options of stream: lerp and gains: ngpt."""

    SECTION: ClassVar[str] = "ngpt"

    alpha_init: float = key(
        0.05, "start of the eigen learning rates, in the order of 1 / n_layers", identity=True, range=RATES
    )
    alpha_scale: float | None = key(None, "start of their parameters; None: d_model^-1/2", identity=True, range=ABOVE_0)
    qk_init: float = key(1.0, "start of s_qk", identity=True, range=ABOVE_0)
    qk_scale: float | None = key(None, "start of its parameters; None: d_model^-1/2", identity=True, range=ABOVE_0)
    u_init: float = key(1.0, "start of s_u", identity=True, range=ABOVE_0)
    u_scale: float = key(1.0, "start of its parameters", identity=True, range=ABOVE_0)
    v_init: float = key(1.0, "start of s_v", identity=True, range=ABOVE_0)
    v_scale: float = key(1.0, "start of its parameters", identity=True, range=ABOVE_0)
    z_init: float = key(1.0, "start of s_z", identity=True, range=ABOVE_0)
    z_scale: float | None = key(None, "start of its parameters; None: d_model^-1/2", identity=True, range=ABOVE_0)


def _scale(model: Model, given: float | None) -> float:
    return model.d_model**-0.5 if given is None else given


def unit(x: "Tensor") -> "Tensor":
    """x: (..., width) -> of length 1, in at least fp32 inside; a zero vector stays one."""
    import torch
    import torch.nn.functional as F

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=TINY).to(x.dtype)


@dataclass(frozen=True)
class Lerp(Stream):
    """x + alpha (f - x): part of the way from the stream to the branch, each feature with a learned alpha >= 0."""

    name: ClassVar[str] = "lerp"
    ratio: float = 1.0
    """init / scale of alpha."""

    def at(self, model: Model, sublayer: int | None = None) -> "Lerp":
        (skip, branch), options = self.gains(model), model.option(NgptOptions)
        ratio = options.alpha_init / _scale(model, options.alpha_scale)
        return replace(self, skip=skip, branch=branch, ratio=ratio)

    def gains(self, model: Model) -> tuple[float, float]:
        alpha = model.option(NgptOptions).alpha_init
        return 1 - alpha, alpha

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("alpha", np.full(model.d_model, _scale(model, model.option(NgptOptions).alpha_scale))),)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        x = chunks[0]
        alpha = (added["alpha"] * self.ratio).abs().to(x.dtype)
        return (x + alpha * (branch.to(x.dtype) - x),)

    def modelling(self, model: Model) -> dict[str, Any]:
        options = model.option(NgptOptions)
        return {"step_ratio": options.alpha_init / _scale(model, options.alpha_scale)}

    def import_obstacle(self, model: Model) -> str:
        return "its skip is not 1 where a branch has any weight"


@dataclass(frozen=True)
class UnitNorm(NormKind):
    """x / |x|: no parameters."""

    name: ClassVar[str] = "unit"
    has_bias: ClassVar[bool] = False
    has_gain: ClassVar[bool] = False
    wide_inside: ClassVar[bool] = True

    def apply(self, x: "Tensor", weight: Any, bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        return unit(x)

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        return NormTheory(scale=scale * model.d_model**-0.5)

    def variance(self, model: Model, variance: float) -> float:
        return 1 / model.d_model

    def modelling(self, model: Model) -> dict[str, Any] | None:
        # Without gains there is nothing that could hold a scale.
        return None if model.axes.placement.by_depth else {"norm_unit": True}

    def import_obstacle(self, model: Model) -> str:
        return "its norms make vectors of length 1, and those of a plain model of length sqrt(d_model)"

    def refusals(self, model: Model) -> Iterable[Refusal]:
        placement = model.axes.placement
        if placement.before_output:
            yield Refusal(
                ("model.norm", "model.placement"),
                "a norm to length 1 inside a sub-layer would shrink its branch by its inner width; "
                "use model.norm=rmsnorm",
            )
        elif model.axes.stream.grows:
            yield Refusal(
                ("model.norm", "model.stream"),
                "a concatenation of length 1 has ever smaller features; use model.norm=rmsnorm",
            )


@dataclass(frozen=True)
class UnitRowsInit(Init):
    """Normal draws brought to length 1 along the embedding dimension."""

    name: ClassVar[str] = "unit_length"
    unit_length: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Of the entries: one over the root of the width along which the length is 1."""
        return (shape[0] if role.kind in WRITING else shape[1]) ** -0.5

    def shaped(self, kind: str, gaussian: "Tensor", partner: "Tensor | None" = None) -> "Tensor":
        return gaussian / gaussian.norm(dim=0 if kind in WRITING else 1, keepdim=True)


@dataclass(frozen=True)
class UnitLength(Reparam):
    """Matrices, the token table and the head get back to length 1 along the embedding dimension after each step."""

    name: ClassVar[str] = "unit_length"
    after_step: ClassVar[bool] = True
    tables: ClassVar[bool] = True

    def applies(self, model: Model, sublayer: int) -> bool:
        return True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not model.axes.init.unit_length:
            yield Refusal(
                ("model.reparam", "model.init"),
                "the first update would change the size of every matrix; use model.init=unit_length",
            )
        if model.axes.maps.rank(model) is not None:
            yield Refusal(
                ("model.reparam", "model.attention.low_rank"),
                "the product of two factors whose rows have length 1 has rows of any length; "
                "use model.attention.low_rank=0",
            )

    def update(self, matrices: Sequence[Any], reduce: Any) -> "list[Tensor]":
        """Factors (d_out,) of the rows of what reads the stream, (1, d_in) of the columns of what writes onto it."""
        from stablelm.methods.spectral import squared_columns, squared_rows

        reading = iter(squared_rows([matrix for matrix in matrices if not matrix.writes], reduce))
        writing = iter(squared_columns([matrix for matrix in matrices if matrix.writes], reduce))
        found = (next(writing)[None] if matrix.writes else next(reading) for matrix in matrices)
        return [squares.clamp(min=TINY).rsqrt() for squares in found]

    def import_obstacle(self, model: Model) -> str:
        return "its matrices have length 1 along the embedding dimension, and those of a plain model any"


@dataclass(frozen=True)
class NgptGains(Gains):
    """s_qk, s_u, s_v and s_z; queries and keys of length 1 before s_qk."""

    name: ClassVar[str] = "ngpt"
    after_turn: ClassVar[bool] = True
    qk: float = 1.0
    up: float = 1.0
    gate: float = 1.0
    z: float = 1.0
    """What multiplies the parameters of s_qk, s_u, s_v and s_z; sqrt(d_model) is in that of the activation's input."""

    def at(self, model: Model) -> "NgptGains":
        options, root = model.option(NgptOptions), math.sqrt(model.d_model)
        return replace(
            self,
            qk=options.qk_init / _scale(model, options.qk_scale),
            up=options.u_init / options.u_scale * (1.0 if model.axes.activation.gated else root),
            gate=options.v_init / options.v_scale * root,
            z=options.z_init / _scale(model, options.z_scale),
        )

    def in_body(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        options = model.option(NgptOptions)
        if sublayer % 2 == 0:
            width = model.axes.stream.widths(model, sublayer).attention
            return (Added("scale_qk", np.full(width, _scale(model, options.qk_scale))),)
        assert model.d_ff is not None
        up = Added("scale_u", np.full(model.d_ff, options.u_scale))
        return (up, Added("scale_v", np.full(model.d_ff, options.v_scale))) if model.axes.activation.gated else (up,)

    def queries_and_keys(
        self, query: "Tensor", key: "Tensor", added: Mapping[str, "Tensor"]
    ) -> "tuple[Tensor, Tensor]":
        """Both are multiplied by s_qk of the query's head: s_qk^2 on the queries, since heads may share keys."""
        factor = (added["scale_qk"] * self.qk).square().view(query.shape[-2:])
        return unit(query) * factor.to(query.dtype), unit(key)

    def logit_factor(self, model: Model) -> float:
        """sqrt(d_head) in place of 1 / sqrt(d_head)."""
        return float(d_head(model))

    def hidden(
        self, hidden: "Tensor", gate: "Tensor | None", added: Mapping[str, "Tensor"]
    ) -> "tuple[Tensor, Tensor | None]":
        hidden = hidden * (added["scale_u"] * self.up).to(hidden.dtype)
        return hidden, None if gate is None else gate * (added["scale_v"] * self.gate).to(gate.dtype)

    def in_head(self, model: Model) -> tuple[Added, ...]:
        assert model.vocab_size is not None
        return (Added("scale_z", np.full(model.vocab_size, _scale(model, model.option(NgptOptions).z_scale))),)

    def output_matrix(self, weight: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        return weight * (added["scale_z"] * self.z)[:, None]

    def start(self, model: Model, kind: str) -> float:
        options = model.option(NgptOptions)
        root = math.sqrt(model.d_model)
        of_fc1 = options.u_init * (1.0 if model.axes.activation.gated else root)
        return {"fc1": of_fc1, "gate": options.v_init * root, "head": options.z_init}.get(kind, 1.0)

    def logits_at_start(self, model: Model) -> float:
        return model.option(NgptOptions).qk_init ** 2

    def normalises_keys(self, model: Model) -> bool:
        return True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.tie_embeddings:
            yield Refusal(
                ("model.gains", "model.tie_embeddings"),
                "the logits have factors of their own, which the token table would share; "
                "use model.tie_embeddings=false",
            )
        if model.attention.qk_norm:
            yield Refusal(
                ("model.gains", "model.attention.qk_norm"),
                "queries and keys are normalised already; use model.attention.qk_norm=false",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        here = self.at(model)
        return {"unit_ratios": {"query_key": here.qk, "up": here.up, "gate": here.gate}}

    def export_obstacle(self, model: Model) -> str:
        return "its queries and keys have length 1 and a factor for each feature, which no standard architecture has"

    def import_obstacle(self, model: Model) -> str:
        return "its queries and keys have length 1, and those of a plain model any"


NGPT = Method(
    "ngpt",
    "Loshchilov et al., nGPT: Normalized Transformer with Representation Learning on the Hypersphere, ICLR 2025",
    {
        "stream": "lerp",
        "placement": "branch_and_post",
        "norm": "unit",
        "init": "unit_length",
        "reparam": "unit_length",
        "gains": "ngpt",
        "activation": "swiglu",
    },
    (
        Lerp(),
        Placement("branch_and_post", on_branch=True, after_write=True),
        UnitNorm(),
        UnitRowsInit(),
        UnitLength(),
        NgptGains(),
    ),
    (NgptOptions,),
)
