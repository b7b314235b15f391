"""Orthogonal matrices that keep the size of what they multiply, with queries of zero."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stablelm.methods.axes import BRANCH_MATRICES, Init, Model, Refusal, Role

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 0.5
"""Std of the logits at the start."""


@dataclass(frozen=True)
class Orthogonal(Init):
    """Zero queries and uniform orthogonal matrices, as "scaled-corrected uniform orthogonal" of Martens et al. 2021.

    The second matrix of a feed-forward is drawn such that its product with the first is orthogonal, too: products of
    independent ones would let the size of all tokens together wander by sqrt(3 / (2 d)) a layer (derived here).
    """

    name: ClassVar[str] = "orthogonal"
    sizes_branches: ClassVar[bool] = True
    unit_variance: ClassVar[bool] = True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not (model.axes.shaping.active or model.axes.shaping.combines):
            yield Refusal(
                ("model.init", "model.attention.shaping"),
                "orthogonal starts with zero queries, which only shaped attention can learn from; "
                "use model.init=fan_in, or model.method=e_spa",
            )

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        return shape[1] ** -0.5

    def head_std(self, model: Model) -> float:
        return LOGITS * model.d_model**-0.5

    def head_scale(self, model: Model) -> float:
        return LOGITS / (self.embedding_std(model) * math.sqrt(model.d_model)) if model.tie_embeddings else 1.0

    def starts_at_zero(self, kind: str) -> bool:
        return kind == "query"

    def draw_variance(self, d_out: int, d_in: int) -> float:
        """A uniform projection keeps a share of Beta(d_out / 2, (d_in - d_out) / 2); a larger map keeps all."""
        return max(0.0, 2 * (d_in - d_out) / (d_out * (d_in + 2)))

    def partner(self, kind: str) -> str | None:
        return "fc1" if kind == "fc2" else None

    def shaped(self, kind: str, gaussian: "Tensor", partner: "Tensor | None" = None) -> "Tensor | None":
        """An orthogonal matrix times max(1, sqrt(d_out / d_in)), which keeps the size of its input's features."""
        if kind not in BRANCH_MATRICES:
            return None
        d_out, d_in = gaussian.shape
        if partner is not None and partner.shape == (d_in, d_out) and d_in >= 2 * d_out:
            return _second(gaussian.double().t(), partner.double()).t().float().contiguous()
        tall = gaussian if d_out >= d_in else gaussian.t()
        q = _orthogonal(tall.double())
        return ((q if d_out >= d_in else q.t()) * max(1.0, math.sqrt(d_out / d_in))).float().contiguous()


def _orthogonal(tall: "Tensor") -> "Tensor":
    """Uniform orthonormal columns from standard normal ones."""
    import torch

    q, r = torch.linalg.qr(tall)
    return q * r.diagonal().sign()


def _second(gaussian: "Tensor", first: "Tensor") -> "Tensor":
    """Orthonormal columns Y, (d_ff, d), such that Y^T Q = k S with Q the orthonormal columns of `first`, k^2 = d / d_ff
    and S orthogonal: Y = (k Q + sqrt(1 - k^2) Z) S^T with Z orthonormal and orthogonal to Q. Y alone is uniform."""
    q = _orthogonal(first)
    inside = q.t() @ gaussian
    outside = _orthogonal(gaussian - q @ inside)
    share = first.shape[1] / first.shape[0]
    return (math.sqrt(share) * q + math.sqrt(1 - share) * outside) @ _orthogonal(inside).t()
