"""E-SPA: a stack without skips, by attention that starts as a fixed decay and a leaky relu (He et al., ICLR 2023).

The attention of layer l is the matrix A_l = L_l L_{l-1}^-1 of Cholesky factors of exp(-gamma_l |i - j|), so that
the tokens' kernel after layer l is exactly that; softmax attention makes it with zero queries, a bias
B_l = log(A_l / rowsum) and a row scale D_l = rowsum(A_l). The closed form (an AR(1) process) is derived here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stablelm.methods.axes import (
    BRANCH_MATRICES,
    Activation,
    Array,
    Init,
    Method,
    Model,
    Refusal,
    Role,
    Shaping,
    Stream,
)
from stablelm.theory.moments import Function, LeakyRelu

if TYPE_CHECKING:
    from torch import Tensor

FINAL_DECAY = 0.005
FINAL_CORRELATION = 0.9


def decay(layer: int, n_layers: int) -> float:
    """gamma after `layer` layers (from 1): -ln(1 - a^(2 layer / n_layers)) / 2 with a^2 = 1 - exp(-2 FINAL_DECAY).

    Geometric in the innovation a_l = sqrt(1 - exp(-2 gamma_l)), so that all layers have the same diagonal.
    """
    return -0.5 * math.log1p(-(_innovation(layer, n_layers) ** 2))


def _innovation(layer: int, n_layers: int) -> float:
    return math.sqrt(-math.expm1(-2 * FINAL_DECAY)) ** (layer / n_layers)


def log_attention(layer: int, n_layers: int, seq_len: int, places: np.ndarray | None = None) -> np.ndarray:
    """log A_l of layer `layer` (from 0) in float64, (seq_len, seq_len), -inf above the diagonal.

    `places`: the rows to compute, (n,) integers; None for all. A row does not depend on `seq_len`.

    With phi = exp(-gamma), a = sqrt(1 - phi^2) and primes for the layer before: A_11 = 1, A_ii = a / a',
    A_ij = (a / a') (phi - phi') phi^(i-j-1), A_i1 = phi^(i-2) (phi - a phi' / a'). Logs, because entries span
    hundreds of orders of magnitude.
    """
    a, before = _innovation(layer + 1, n_layers), _innovation(layer, n_layers)
    phi, phi_before = math.sqrt(1 - a * a), math.sqrt(max(0.0, 1 - before * before))
    log_phi, log_ratio = math.log(phi), math.log(a / before)
    queries = np.arange(seq_len) if places is None else places
    distance = np.subtract.outer(queries.astype(np.float64), np.arange(seq_len, dtype=np.float64))
    logs = log_ratio + math.log(phi - phi_before) + (distance - 1) * log_phi
    logs[:, 0] = distance[:, 0] * log_phi - log_phi + math.log(phi - a / before * phi_before)
    logs[distance == 0] = log_ratio
    logs[queries == 0, 0] = 0.0
    logs[distance < 0] = -np.inf
    return logs


def bias_and_scale(
    layer: int, n_layers: int, seq_len: int, places: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(B, D): the bias on the logits, (seq_len, seq_len), and what multiplies each row's output, (seq_len,).

    `places`: the rows of both that are wanted; None: all.
    """
    logs = log_attention(layer, n_layers, seq_len, places)
    rows = np.exp(logs).sum(axis=1)
    return logs - np.log(rows)[:, None], rows


@lru_cache(maxsize=64)
def tailored_slope(n_layers: int) -> float:
    """Negative slope of the leaky relu that takes correlation 0 to FINAL_CORRELATION over n_layers activations.

    Tailored activation transformation (Zhang et al., ICLR 2022) as used by He et al.: bisection on the slope of
    `composed_correlation`; 0 (a relu) where depth is too small to get there.
    """
    if composed_correlation(0.0, n_layers) <= FINAL_CORRELATION:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if composed_correlation(middle, n_layers) > FINAL_CORRELATION else (low, middle)
    return (low + high) / 2


def composed_correlation(slope: float, activations: int) -> float:
    """Correlation of two uncorrelated inputs after that many leaky relus: the C map of Zhang et al., composed."""
    weight = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    c = 0.0
    for _ in range(activations):
        c = min(1.0, c + weight * (math.sqrt(max(0.0, 1 - c * c)) - c * math.acos(c)))
    return c


@dataclass(frozen=True)
class Skipless(Stream):
    """f(x) alone."""

    name: ClassVar[str] = "skipless"
    has_skip: ClassVar[bool] = False

    def gains(self, model: Model) -> tuple[float, float]:
        return 0.0, 1.0

    def refusals(self, model: Model) -> Iterable[Refusal]:
        placement, each = model.axes.placement, model.axes.placement.used()
        if not model.axes.shaping.replaces_skip:
            yield Refusal(
                ("model.stream", "model.attention.shaping"),
                "without a skip, attention that starts uniform makes all tokens equal within a few layers; "
                "use model.attention.shaping=espa, or a stream with a skip",
            )
        if any(at.after_write or at.on_branch or at.before_output or at.by_depth for at in each):
            yield Refusal(
                ("model.stream", "model.placement"),
                "espa's decay leaves the size of the stream alone, which norms at other places would not; "
                "use model.placement=none or pre",
            )
        elif not placement.before_body and not model.axes.activation.keeps_variance:
            yield Refusal(
                ("model.stream", "model.placement", "model.activation"),
                "without skips and norms the signal shrinks with every activation whose variance is not 1; "
                "use model.activation=tailored, or model.placement=pre",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its layers have no skips, which every standard architecture has"


@dataclass(frozen=True)
class Espa(Shaping):
    name: ClassVar[str] = "espa"
    replaces_skip: ClassVar[bool] = True
    active: ClassVar[bool] = True

    def bias_and_scale(self, layer: int, n_layers: int, seq_len: int) -> tuple[Array, Array]:
        return bias_and_scale(layer, n_layers, seq_len)

    def rows(self, layer: int, n_layers: int, places: NDArray[np.int64], length: int) -> tuple[Array, Array]:
        return bias_and_scale(layer, n_layers, length, places)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        axes = model.axes
        if axes.stream != Skipless() or axes.init != Orthogonal():
            yield Refusal(
                ("model.attention.shaping", "model.stream", "model.init"),
                "the decay of espa is solved for a stack without skips and for orthogonal weights with zero queries; "
                "use model.stream=skipless and model.init=orthogonal, or model.attention.shaping=none",
            )
        if axes.position.biases_logits or model.attention.qk_norm:
            yield Refusal(
                ("model.attention.shaping", "model.attention.position", "model.attention.qk_norm"),
                "espa is itself a bias on the logits and starts with queries of zero, which a norm cannot scale; "
                "use model.attention.position=none, rope or learned, and no qk_norm",
            )
        if axes.value_mixing.share is not None:
            yield Refusal(
                ("model.attention.value_residual", "model.attention.shaping"),
                "mixing in the first layer's values is a skip, which espa's decay does not account for; "
                "use model.attention.value_residual=false",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        layers = range(model.n_layers + 1)
        return {"attention_innovations": [_innovation(layer, model.n_layers) for layer in layers]}


@dataclass(frozen=True)
class Orthogonal(Init):
    """Zero queries and uniform orthogonal matrices, as "scaled-corrected uniform orthogonal" of Martens et al. 2021."""

    name: ClassVar[str] = "orthogonal"
    sizes_branches: ClassVar[bool] = True
    unit_variance: ClassVar[bool] = True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not model.axes.shaping.active:
            yield Refusal(
                ("model.init", "model.attention.shaping"),
                "orthogonal starts with zero queries, which only espa's attention can learn from; "
                "use model.init=fan_in, or model.method=e_spa",
            )

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        return shape[1] ** -0.5

    def starts_at_zero(self, kind: str) -> bool:
        return kind == "query"

    def shaped(self, kind: str, gaussian: "Tensor") -> "Tensor | None":
        """An orthogonal matrix times max(1, sqrt(d_out / d_in)), which keeps the size of its input's features."""
        import torch

        if kind not in BRANCH_MATRICES:
            return None
        d_out, d_in = gaussian.shape
        tall = gaussian if d_out >= d_in else gaussian.t()
        q, r = torch.linalg.qr(tall.double())
        q = q * r.diagonal().sign()
        return ((q if d_out >= d_in else q.t()) * max(1.0, math.sqrt(d_out / d_in))).float().contiguous()


@dataclass(frozen=True)
class Tailored(Activation):
    """A leaky relu times sqrt(2 / (1 + slope^2)), its slope by the depth (Zhang et al., ICLR 2022)."""

    name: ClassVar[str] = "tailored"
    keeps_variance: ClassVar[bool] = True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not model.axes.init.unit_variance:
            yield Refusal(
                ("model.activation", "model.init"),
                "the tailored slope is solved for activations of unit variance; "
                "use model.init=fan_in, unit or orthogonal, or model.activation=relu",
            )

    def apply(self, hidden: "Tensor", gate: "Tensor | None", n_layers: int) -> "Tensor":
        import torch.nn.functional as F

        return F.leaky_relu(hidden, tailored_slope(n_layers)) * self.output_scale(n_layers)

    def function(self, n_layers: int) -> Function:
        return LeakyRelu(tailored_slope(n_layers))

    def output_scale(self, n_layers: int) -> float:
        return math.sqrt(2 / (1 + tailored_slope(n_layers) ** 2))

    def second_moment(self, variance: float, n_layers: int) -> float:
        return variance  # scaled to keep it

    def correlation(self, r: float, n_layers: int) -> float:
        return r  # a leaky relu of a slope near 1 turns it by less than the recursion resolves

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"negative_slope": tailored_slope(model.n_layers)}


E_SPA = Method(
    "e_spa",
    "He et al., Deep Transformers without Shortcuts, ICLR 2023",
    {
        "stream": "skipless",
        "placement": "none",
        "init": "orthogonal",
        "activation": "tailored",
        "attention.shaping": "espa",
        "attention.position": "none",
    },
    (Skipless(), Espa(), Orthogonal(), Tailored()),
)
