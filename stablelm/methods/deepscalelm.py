"""DeepScaleLM: branches of unit variance onto a stream of unit variance (Kedia et al., ICML 2024).

In a causal decoder attention keeps more variance than the tokens' common part, which the form `causal` counts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from stablelm.key import ABOVE_0, key
from stablelm.methods.axes import Init, M, Method, MethodOptions, Model, Refusal, Role, Stream
from stablelm.methods.solve import solve

KEDIA = "Kedia et al., Transformers Get Stable, ICML 2024"
FEEDFORWARD = ("fc1", "gate", "fc2")


@dataclass(frozen=True)
class DeepscaleOptions(MethodOptions):
    """Options of stream: scaled and init: deepscale; deepscale.* is their short form."""

    SHORT_FORM: ClassVar[bool] = True
    SECTION: ClassVar[str] = "deepscale"

    k: float = key(2.0, "beta^2 = k / n_layers, lambda^2 = 1 - beta^2", identity=True, range=ABOVE_0)
    form: Literal["causal", "literal"] = key(
        "causal", "correlation recursion: for a causal decoder, or as released for an encoder", identity=True
    )
    norm_eps: Literal["fixed", "shrinking"] = key(
        "fixed",
        "shrinking: the eps of norms before sub-layers falls by lambda^2 a sub-layer, as the square of what is left of "
        "the embedding does; set on import, which is exact then",
        identity=True,
    )


@dataclass(frozen=True)
class Scaled(Stream):
    """lambda x + beta f(x) with beta^2 = k / n_layers, lambda^2 = 1 - beta^2 (Kedia et al. 2024, section 4)."""

    name: ClassVar[str] = "scaled"

    def gains(self, model: Model) -> tuple[float, float]:
        beta_squared = model.option(DeepscaleOptions).k / model.n_layers
        return math.sqrt(1 - beta_squared), math.sqrt(beta_squared)

    def eps_scale(self, model: Model, sublayer: int) -> float:
        return self.gains(model)[0] ** (2 * sublayer) if model.option(DeepscaleOptions).norm_eps == "shrinking" else 1.0

    def for_import(self, model: M) -> M:
        return model.changed(replace(model.option(DeepscaleOptions), norm_eps="shrinking"))

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.option(DeepscaleOptions).k >= model.n_layers:
            yield Refusal(
                ("model.deepscale.k", "model.n_layers"),
                f"nothing of the skip remains, lambda^2 = 1 - k / n_layers; use k below {model.n_layers}",
            )


def solved_std(role: Role, stds: Sequence[dict[str, float]]) -> float:
    """A matrix's std from `methods.solve`."""
    assert role.layer is not None
    return stds[2 * role.layer + (role.kind in FEEDFORWARD)][role.kind]


@dataclass(frozen=True)
class DeepscaleInit(Init):
    name: ClassVar[str] = "deepscale"
    sizes_branches: ClassVar[bool] = True
    solved: ClassVar[bool] = True
    unit_variance: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        literal = model.option(DeepscaleOptions).form == "literal"
        return solved_std(role, solve(model, shared=True, literal=literal))


DEFAULTS = {"stream": "scaled", "init": "deepscale", "activation": "relu"}
DEEPSCALELM_PRE = Method("deepscalelm_pre", KEDIA, DEFAULTS, (Scaled(), DeepscaleInit()), (DeepscaleOptions,))
DEEPSCALELM_POST = Method("deepscalelm_post", KEDIA, {**DEFAULTS, "placement": "post", "embedding_norm": True})
