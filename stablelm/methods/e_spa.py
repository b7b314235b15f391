"""E-SPA: a stack without skips, by attention that starts as a fixed decay and a leaky relu (He et al., ICLR 2023).

The attention of layer l is A_l = D_l P_l. P_l has the shape of the matrix that takes exp(-gamma_(l-1) |i - j|) to
exp(-gamma_l |i - j|); D_l brings the variance back to 1, given what attention and feed-forwards have made of the
tokens' kernel so far (`theory.faithful_attention`). Softmax makes it with zero queries, a bias log P_l and a row scale.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stablelm.key import ABOVE_0, Range, key
from stablelm.methods.activations import UnitLeakyRelu
from stablelm.methods.axes import (
    Array,
    Method,
    MethodOptions,
    Model,
    Refusal,
    Shaping,
    Stream,
)
from stablelm.methods.orthogonal import Orthogonal
from stablelm.theory.faithful_attention import Decay, Setting, at_places, decay_factors, planned_length
from stablelm.theory.moments import token_collision

if TYPE_CHECKING:
    pass

HE = "He et al., Deep Transformers without Shortcuts, ICLR 2023"
LARGEST = 0.85
"""Correlation of two different tokens up to which feed-forwards alone may take them."""
SHARE = Range("above 0 and below 1", lambda v: 0 < v < 1)


@dataclass(frozen=True)
class EspaOptions(MethodOptions):
    """Options of attention.shaping: espa and uspa, of activation: tailored and of stream: weighted."""

    SECTION: ClassVar[str] = "e_spa"

    decay: float = key(
        0.005,
        "espa: attention alone leaves two tokens the correlation exp(-this x distance)",
        identity=True,
        range=ABOVE_0,
    )
    uniform: float = key(0.8, "uspa: correlation of two tokens after the last attention", identity=True, range=SHARE)
    nonlinearity: float = key(
        0.2, "tailored: all activations together take correlation 0 to this", identity=True, range=SHARE
    )
    skip: float = key(0.98, "weighted: gain of the skip; the branch has sqrt(1 - skip^2)", identity=True, range=SHARE)


def setting(model: Model) -> Setting:
    """What the plan of the model's attention depends on."""
    collision = float(token_collision(model.vocab_size)) if model.vocab_size else 0.0
    if model.axes.position.adds_table:
        collision /= 2
    activation, (skip, branch) = model.axes.activation, model.axes.stream.gains(model)
    function = activation.function()
    return Setting(model.n_layers, collision * (1 - model.dropout), function, activation.gated, skip, branch)


@lru_cache(maxsize=64)
def tailored_slope(n_layers: int, correlation: float) -> float:
    """Negative slope of the leaky relu that takes correlation 0 to that one over n_layers activations.

    Tailored activation transformation (Zhang et al., ICLR 2022) as used by He et al.: bisection on the slope of
    `composed_correlation`; 0 (a relu) where depth is too small to get there.
    """
    if composed_correlation(0.0, n_layers) <= correlation:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if composed_correlation(middle, n_layers) > correlation else (low, middle)
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
                "use model.attention.shaping=espa, uspa or value_skip, or a stream with a skip",
            )
        if any(at.after_write or at.on_branch or at.before_output or at.by_depth for at in each):
            yield Refusal(
                ("model.stream", "model.placement"),
                "shaped attention leaves the size of the stream alone, which norms at other places would not; "
                "use model.placement=none or pre",
            )
        elif not placement.before_body and not model.axes.activation.keeps_variance:
            yield Refusal(
                ("model.stream", "model.placement", "model.activation"),
                "without skips and norms the signal shrinks with every activation whose variance is not 1; "
                "use model.activation=tailored, or model.placement=pre",
            )
        if model.axes.init != Orthogonal():
            yield Refusal(
                ("model.stream", "model.init"),
                "without skips the product of all layers' matrices must be orthogonal, lest it leaves few directions; "
                "use model.init=orthogonal, or a stream with a skip",
            )
        if not placement.before_body and model.dropout:
            yield Refusal(
                ("model.stream", "model.dropout"),
                "without skips and norms dropout multiplies the variance at every sub-layer; "
                "use model.dropout=0, or model.placement=pre",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its layers have no skips, which every standard architecture has"


@dataclass(frozen=True)
class Weighted(Stream):
    """a x + sqrt(1 - a^2) f(x): the paper's models with skips and without norms."""

    name: ClassVar[str] = "weighted"

    def gains(self, model: Model) -> tuple[float, float]:
        skip = model.option(EspaOptions).skip
        return skip, math.sqrt(1 - skip**2)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        each = model.axes.placement.used()
        if any(at.after_write or at.on_branch or at.before_output or at.by_depth for at in each):
            yield Refusal(
                ("model.stream", "model.placement"),
                "skip and branch are weighted for branches of the stream's size, which norms there would change; "
                "use model.placement=none or pre",
            )
        if not model.axes.activation.keeps_variance or not model.axes.init.unit_variance:
            yield Refusal(
                ("model.stream", "model.activation", "model.init"),
                "skip and branch are weighted for branches of the stream's size; use model.activation=tailored or "
                "shaped_relu and model.init=orthogonal or fan_in, or model.stream=residual",
            )


class Planned(Shaping):
    """Attention that starts as a planned matrix: what its values have in common."""

    replaces_skip: ClassVar[bool] = True
    active: ClassVar[bool] = True

    def bias_and_scale(self, model: Model, layer: int, seq_len: int) -> tuple[Array, Array]:
        return self.rows(model, layer, np.arange(seq_len), seq_len)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        axes = model.axes
        if axes.init != Orthogonal() or not isinstance(axes.stream, self.streams()):
            yield Refusal(
                ("model.attention.shaping", "model.stream", "model.init"),
                "attention is planned for the kernel of a stream without skips, or for espa with weighted ones, and "
                "for orthogonal weights with zero queries; use model.stream=skipless and model.init=orthogonal, or "
                "model.attention.shaping=none",
            )
        if axes.position.biases_logits or model.attention.qk_norm:
            yield Refusal(
                ("model.attention.shaping", "model.attention.position", "model.attention.qk_norm"),
                "shaped attention is itself a bias on the logits and starts with queries of zero, which a norm cannot "
                "scale; use model.attention.position=none, rope or learned, and no qk_norm",
            )
        if axes.value_mixing.share is not None:
            yield Refusal(
                ("model.attention.value_residual", "model.attention.shaping"),
                "mixing in the first layer's values is a skip, which the plan of attention does not account for; "
                "use model.attention.value_residual=false",
            )
        if isinstance(axes.stream, self.streams()):
            yield from self.out_of_reach(model)

    def streams(self) -> tuple[type[Stream], ...]:
        """The streams that it is planned for."""
        return (Skipless,)

    def out_of_reach(self, model: Model) -> Iterable[Refusal]:
        """Why no plan reaches its end."""
        return ()


@dataclass(frozen=True)
class Espa(Planned):
    name: ClassVar[str] = "espa"

    def streams(self) -> tuple[type[Stream], ...]:
        return (Skipless, Weighted)

    def rows(self, model: Model, layer: int, places: NDArray[np.int64], length: int) -> tuple[Array, Array]:
        decay = _decay(model)
        logs = decay.log_rows(layer, places, length)
        factors = decay_factors(setting(model), decay, planned_length(decay, length))
        return logs - np.log(np.exp(logs).sum(axis=1))[:, None], at_places(factors[layer], places)

    def out_of_reach(self, model: Model) -> Iterable[Refusal]:
        if setting(model).fed_alone(model.n_layers) > LARGEST:
            yield Refusal(
                ("model.attention.shaping", "model.placement", "model.activation", "model.n_layers"),
                "the feed-forwards alone make different tokens nearly equal, which no attention takes back; "
                "use model.activation=tailored with a small model.e_spa.nonlinearity, or fewer layers",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        assert model.max_seq_len is not None
        decay = _decay(model)
        size = min(model.max_seq_len, planned_length(decay, model.max_seq_len))
        factors = decay_factors(setting(model), decay, planned_length(decay, size))[:, :size]
        return {
            "attention_innovations": [decay.innovation(layer) for layer in range(model.n_layers + 1)],
            "attention_factors": factors.tolist(),
        }


def _decay(model: Model) -> Decay:
    return Decay(model.n_layers, model.option(EspaOptions).decay)


@dataclass(frozen=True)
class Tailored(UnitLeakyRelu):
    """Its slope follows from the depth (Zhang et al., ICLR 2022)."""

    name: ClassVar[str] = "tailored"
    earlier: ClassVar[Mapping[str, Any]] = {f"model.{EspaOptions.SECTION}.nonlinearity": 0.9}

    def at(self, model: Model) -> "Tailored":
        return replace(self, slope=tailored_slope(model.n_layers, model.option(EspaOptions).nonlinearity))

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not model.axes.init.unit_variance:
            yield Refusal(
                ("model.activation", "model.init"),
                "the tailored slope is solved for activations of unit variance; "
                "use model.init=fan_in, unit or orthogonal, or model.activation=relu",
            )


DEFAULTS = {
    "stream": "skipless",
    "placement": "none",
    "init": "orthogonal",
    "activation": "tailored",
    "attention.shaping": "espa",
    "attention.position": "none",
}
E_SPA = Method("e_spa", HE, DEFAULTS, (Skipless(), Weighted(), Espa(), Orthogonal(), Tailored()), (EspaOptions,))
E_SPA_SKIPS = Method("e_spa_skips", HE, {**DEFAULTS, "stream": "weighted"})
