"""DyT as in its paper's language models: slopes by width, and a learned factor of the embeddings (Zhu et al. 2025)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stablelm.key import ABOVE_0, key
from stablelm.methods.axes import Method, MethodOptions, Model
from stablelm.methods.norms import DyT

# Zhu et al. 2025, tables 11 and 12: width, starts of alpha in front of attention and elsewhere; depth has no influence.
SLOPES = ((1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (8192, 0.2, 0.05))


@dataclass(frozen=True)
class DytOptions(MethodOptions):
    """Options of norm: dyt_lm."""

    SECTION: ClassVar[str] = "dyt"

    attention_alpha: float | None = key(
        None, "start of the slope in attention sub-layers; None: by width", identity=True, range=ABOVE_0
    )
    other_alpha: float | None = key(
        None, "start of the slope in feed-forward sub-layers and outside layers; None: by width", identity=True,
        range=ABOVE_0,
    )  # fmt: skip


def slope_by_width(width: int, attention: bool) -> float:
    """The table's, between its widths a power of the width (ours), outside that of the nearest."""
    widths, *starts = (np.log(column) for column in zip(*SLOPES, strict=True))
    return float(np.exp(np.interp(math.log(width), widths, starts[0 if attention else 1])))


@dataclass(frozen=True)
class DytLm(DyT):
    """tanh(alpha x), alpha by place and width, after embeddings times a learned scalar that starts at sqrt(d_model)."""

    name: ClassVar[str] = "dyt_lm"

    def slope(self, model: Model, attention: bool) -> float:
        options = model.option(DytOptions)
        asked = options.attention_alpha if attention else options.other_alpha
        return slope_by_width(model.d_model, attention) if asked is None else asked

    def embedding_gain(self, model: Model) -> float:
        """sqrt(d_model) for tables of std d_model^-1/2 (section 7); less what the initialisation scales itself, so
        that both give the same stream (ours)."""
        init = model.axes.init
        return 1.0 if init.unit_variance else math.sqrt(model.d_model) / init.embedding_scale(model)

    def modelling(self, model: Model) -> dict[str, Any]:
        slopes = {"norm_slope": self.slope(model, False), "norm_slope_attention": self.slope(model, True)}
        return {**slopes, "embedding_gain": self.embedding_gain(model)}


DYT = Method(
    "dyt",
    "Zhu et al., Transformers without Normalization, CVPR 2025",
    {"norm": "dyt_lm"},
    (DytLm(),),
    (DytOptions,),
)
