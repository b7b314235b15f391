"""CompleteP: learning rates that hold from a small, shallow model to a wide, deep one (Dey et al. 2025, table 1)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.key import AT_LEAST_1, Range, key
from stablelm.methods.axes import Init, Method, MethodOptions, Model, Rates, Refusal, Role, Stream

ALPHAS = Range("0.5 to 1", lambda v: 0.5 <= v <= 1)


@dataclass(frozen=True)
class CompletepOptions(MethodOptions):
    """Options of stream and init: completep."""

    SECTION: ClassVar[str] = "completep"

    alpha: float = key(
        1.0, "branches are divided by (n_layers / base_depth)^alpha; 0.5 to 1", identity=True, range=ALPHAS
    )
    base_depth: int = key(
        2, "depth at which the learning rate was tuned", unit="layers", identity=True, range=AT_LEAST_1
    )
    base_width: int = key(256, "width at which the learning rate was tuned", identity=True, range=AT_LEAST_1)


def depth_ratio(model: Model) -> float:
    """m_L = n_layers / base_depth."""
    return model.n_layers / model.option(CompletepOptions).base_depth


def width_ratio(model: Model) -> float:
    """m_N = d_model / base_width."""
    return model.d_model / model.option(CompletepOptions).base_width


@dataclass(frozen=True)
class CompletepStream(Stream):
    """x + m_L^-alpha f(x)."""

    name: ClassVar[str] = "completep"

    def gains(self, model: Model) -> tuple[float, float]:
        return 1.0, depth_ratio(model) ** -model.option(CompletepOptions).alpha


@dataclass(frozen=True)
class CompletepInit(Init):
    name: ClassVar[str] = "completep"
    sizes_branches: ClassVar[bool] = True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.axes.stream.grows:
            yield Refusal(
                ("model.init", "model.stream"),
                "completep's rates are derived for a sum over layers; use model.init=fan_in or unit with "
                f"model.stream={model.axes.stream.name}",
            )

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """0.02 / sqrt(m_N), output projections too."""
        return 0.02 / math.sqrt(width_ratio(model))

    def embedding_std(self, model: Model) -> float:
        return 0.02

    def head_std(self, model: Model) -> float:
        return 0.02

    def head_scale(self, model: Model) -> float:
        """1 / m_N."""
        return 1 / width_ratio(model)

    def logit_scale(self, d_head: int) -> float:
        """1 / d_head."""
        return 1 / d_head

    def rates(self, model: Model, *, in_layer: bool, matrix: bool) -> Rates:
        """In the layers matrices learn at m_L^(alpha-1) / m_N with m_N times the (coupled) decay, vectors at
        m_L^(alpha-1), and epsilon falls with m_L^-alpha / m_N."""
        if not in_layer:
            return Rates()
        depth, width, alpha = depth_ratio(model), width_ratio(model), model.option(CompletepOptions).alpha
        by_depth, eps = depth ** (alpha - 1), depth**-alpha / width
        return Rates(by_depth / width, width, eps) if matrix else Rates(by_depth, 1.0, eps)


COMPLETEP = Method(
    "completep",
    "Dey et al., Don't be lazy: CompleteP enables compute-efficient deep transformers, 2025",
    {"stream": "completep", "init": "completep"},
    (CompletepStream(), CompletepInit()),
    (CompletepOptions,),
)
