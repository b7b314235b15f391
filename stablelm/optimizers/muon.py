"""Muon: momentum of the layers' matrices, made orthogonal by Newton-Schulz; AdamW for all other parameters."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stablelm.key import ABOVE_0, AT_LEAST_1, Range, key
from stablelm.methods.roles import Refusal
from stablelm.optimizers.adamw import AdamWUpdate
from stablelm.optimizers.interface import StateTensor, Update, WholeMatrices

if TYPE_CHECKING:
    from torch import Tensor

# ruff: noqa: RUF009 - key() makes dataclass fields
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7
RMS = 0.2
"""Of an AdamW update as Liu et al. 2025 found it, which `scale: rms` gives those of matrices too."""


@dataclass(frozen=True)
class MuonOptions:
    """Muon's options"""

    momentum: float = key(
        0.95, "averaging constant", identity=True, range=Range("at least 0 and below 1", lambda v: 0 <= v < 1)
    )
    nesterov: bool = key(True, "look one gradient ahead", identity=True)
    iterations: int = key(5, "of Newton-Schulz", identity=True, range=AT_LEAST_1)
    scale: Literal["rms", "spectral"] = key(
        "rms",
        "of a matrix's update. rms: 0.2 sqrt(max(rows, columns)), so that train.lr and weight_decay mean what they do "
        "to AdamW; spectral: sqrt(max(1, rows / columns))",
        identity=True,
    )
    lr_factor: float = key(1.0, "what multiplies train.lr for these matrices", identity=True, range=ABOVE_0)
    qk_clip: float | None = key(
        None,
        "largest attention logit of a step, beyond which a head's query and key matrices shrink after it (MuonClip); "
        "None: they do not",
        identity=True,
        range=ABOVE_0,
    )


@dataclass(frozen=True)
class MuonUpdate(Update):
    """Jordan et al. 2024; with scale: rms, Liu et al. 2025 (Muon is Scalable for LLM Training), section 2.2.

    m = b m + (1 - b) g, w -= lr (scale O + decay w), O = Newton-Schulz of (1 - b) g + b m, or of m.
    """

    options: MuonOptions = MuonOptions()
    others: AdamWUpdate = AdamWUpdate()
    bf16: bool = False
    name: ClassVar[str] = "muon"
    papers: ClassVar[tuple[str, ...]] = (
        "Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024",
        "Liu et al., Muon is Scalable for LLM Training, 2025",
        "Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, section 2.1 (QK-Clip)",
    )
    zero_obstacle: ClassVar[str] = "cut the matrices that it needs whole"

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        return {"momentum": StateTensor()} if hidden else self.others.states(hidden=False)

    def update(self, piece: Any) -> None:
        self.others.update(piece)

    def whole(self, *, hidden: bool) -> WholeMatrices | None:
        if not hidden:
            return None
        return WholeMatrices("momentum", self._momentum, self._direction, self._applied, self._flops)

    def _momentum(self, gradient: "Tensor", momentum: "Tensor") -> "tuple[Tensor, Tensor]":
        new = momentum.lerp(gradient, 1 - self.options.momentum)
        return new, gradient.lerp(new, self.options.momentum) if self.options.nesterov else new

    def _direction(self, matrix: "Tensor") -> "Tensor":
        import torch

        return newton_schulz(matrix.to(torch.bfloat16) if self.bf16 else matrix, self.options.iterations)

    def _applied(
        self, weight: "Tensor", direction: "Tensor", lr: float, decay: float, shape: tuple[int, int]
    ) -> "Tensor":
        return (weight * (1 - lr * decay)).add_(direction.to(weight.dtype), alpha=-lr * self.scale(shape))

    def scale(self, shape: tuple[int, int]) -> float:
        """What multiplies the orthogonal matrix of that shape (rows d_out, columns d_in)."""
        rows, columns = shape
        if self.options.scale == "rms":
            return RMS * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))

    def _flops(self, shape: tuple[int, int]) -> float:
        """X X^T, its square, and their product with X, in each iteration."""
        short, long = sorted(shape)
        return self.options.iterations * (4.0 * short * short * long + 2.0 * short**3)

    def refusals(self, config: Any) -> Iterator[Refusal]:
        if config.train.muon.qk_clip is None:
            return
        clip = f"train.muon.qk_clip={config.train.muon.qk_clip}"
        if config.engine.recompute in ("selective", "auto"):
            yield Refusal(
                ("train.muon.qk_clip", "engine.recompute"),
                f"{clip} is not possible with engine.recompute={config.engine.recompute}, as selective recomputation "
                "would keep the logits that it looks at; use engine.recompute=attention",
            )
        if config.data.document_mask:
            yield Refusal(
                ("train.muon.qk_clip", "data.document_mask"),
                f"{clip} would count logits of other documents under data.document_mask=true; leave one of them out",
            )

    def model_refusals(self, model: Any) -> Iterator[Refusal]:
        """`model` has its axes: where scaling query and key matrices does not scale the logits."""
        if self.options.qk_clip is None:
            return
        clip = f"train.muon.qk_clip={self.options.qk_clip}"
        if model.attention.qk_norm:
            yield Refusal(
                ("train.muon.qk_clip", "model.attention.qk_norm"),
                f"{clip} changes nothing where model.attention.qk_norm=true normalises queries and keys; leave one of "
                "them out",
            )
        if model.axes.reparam.applies(model, 0):
            yield Refusal(
                ("train.muon.qk_clip", "model.reparam"),
                f"{clip} scales query and key matrices, whose norm means nothing under model.reparam={model.reparam}; "
                "leave one of them out",
            )


def newton_schulz(matrix: "Tensor", iterations: int) -> "Tensor":
    """A matrix of about the same singular vectors whose singular values are about 1 (0.7 to 1.2), in its dtype."""
    a, b, c = COEFFICIENTS
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if turned else matrix
    x = x / (x.norm() + NORM_EPS)
    for _ in range(iterations):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if turned else x
