"""Layers left out at random in training: LayerDrop and stochastic depth.

Fan et al., Reducing Transformer Depth on Demand with Structured Dropout, ICLR 2020 (section 3.1: each layer with the
same probability, nothing scaled); Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (equation 4: survival
1 - (l / L)(1 - p_L) of block l of L; equation 5: a block is multiplied by its survival when the model is used). A draw
is of (run.seed, step, layer), one for the whole batch, and so the same however the batch is divided into micro-batches
and over ranks, and after a resume. What is dropped is computed and multiplied by 0, so that no collective depends on
the draw.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stablelm.key import Range, key
from stablelm.methods.axes import DepthDrop, Method, MethodOptions, Model, Refusal

RATES = Range("at least 0 and below 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True)
class DropOptions(MethodOptions):
    """Options of depth_drop: uniform and linear_decay."""

    SECTION: ClassVar[str] = "drop"

    rate: float = key(
        0.2, "probability that a layer is left out; linear_decay: that of the last one", identity=True, range=RATES
    )
    unit: Literal["layer", "sublayer"] = key(
        "layer", "what is drawn: both branches of a layer together, or each of them", identity=True
    )
    scale: Literal["own", "none", "evaluation", "training", "variance"] = key(
        "own",
        "with p the probability of survival: none: nothing is multiplied; evaluation: branches by p in evaluation; "
        "training: those that are kept by 1/p; variance: by 1/sqrt(p), which keeps their mean square; own: none for "
        "uniform, evaluation for linear_decay, as in the papers",
        identity=True,
    )


class RandomDrop(DepthDrop):
    """What both schedules have in common."""

    active: ClassVar[bool] = True
    own_scale: ClassVar[str]

    def _scale(self, model: Model) -> str:
        scale = model.option(DropOptions).scale
        return self.own_scale if scale == "own" else scale

    def draws_layers(self, model: Model) -> bool:
        return model.option(DropOptions).unit == "layer"

    def trained(self, model: Model, sublayer: int) -> float:
        power = {"training": -1.0, "variance": -0.5}.get(self._scale(model), 0.0)
        return self.survival(model, sublayer) ** power

    def evaluated(self, model: Model, sublayer: int) -> float:
        return self.survival(model, sublayer) if self._scale(model) == "evaluation" else 1.0

    def modelling(self, model: Model) -> dict[str, Any]:
        factors = [self.evaluated(model, sublayer) for sublayer in range(2 * model.n_layers)]
        return {} if set(factors) == {1.0} else {"branch_factors": factors}

    def import_obstacle(self, model: Model) -> str | None:
        if self.modelling(model):
            return "it multiplies branches by their probability in evaluation, which a plain model does not"
        return None

    def refusals(self, model: Model) -> Iterable[Refusal]:
        stream = model.axes.stream
        if not stream.has_skip:
            yield Refusal(
                ("model.depth_drop", "model.stream"),
                "without a skip nothing is left of the stream where a branch is left out; use model.stream=residual",
            )
        elif stream.grows:
            yield Refusal(
                ("model.depth_drop", "model.stream"),
                "a branch is features of its own there, and a layer that is left out would take them from all later "
                "ones; use model.stream=residual",
            )


@dataclass(frozen=True)
class UniformDrop(RandomDrop):
    """Every layer with the same probability (Fan et al. 2020)."""

    name: ClassVar[str] = "uniform"
    own_scale: ClassVar[str] = "none"

    def survival(self, model: Model, sublayer: int) -> float:
        return 1 - model.option(DropOptions).rate


@dataclass(frozen=True)
class LinearDecayDrop(RandomDrop):
    """Survival falls linearly with the depth (Huang et al. 2016, equation 4)."""

    name: ClassVar[str] = "linear_decay"
    own_scale: ClassVar[str] = "evaluation"

    def survival(self, model: Model, sublayer: int) -> float:
        share = (sublayer // 2 + 1) / model.n_layers
        if not self.draws_layers(model):
            share = (sublayer + 1) / (2 * model.n_layers)
        return 1 - share * model.option(DropOptions).rate


LAYER_DROP = Method(
    "layer_drop",
    "Fan et al., Reducing Transformer Depth on Demand with Structured Dropout, ICLR 2020",
    {"depth_drop": "uniform"},
    (UniformDrop(), LinearDecayDrop()),
    (DropOptions,),
)
STOCHASTIC_DEPTH = Method(
    "stochastic_depth",
    "Huang et al., Deep Networks with Stochastic Depth, ECCV 2016",
    {"depth_drop": "linear_decay"},
)
