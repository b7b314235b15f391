"""LayerScale: a learned factor for each feature of a branch, which starts small (Touvron et al., ICCV 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import key
from stablelm.methods.axes import Added, Array, Method, MethodOptions, Model, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

STARTS = ((18, 0.1), (24, 1e-5))
"""(layers at most, start); deeper ones start at `DEEPEST`."""
DEEPEST = 1e-6


@dataclass(frozen=True)
class LayerScaleOptions(MethodOptions):
    """Options of stream: layerscale."""

    SECTION: ClassVar[str] = "layerscale"

    start: float | None = key(
        None, "start of the factors; None: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond", identity=True
    )


@dataclass(frozen=True)
class LayerScale(Stream):
    """x + g * f(x), g (width,) for each sub-layer (section 2, eq. 3)."""

    name: ClassVar[str] = "layerscale"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("gain", np.full(self.widths(model, sublayer).branch, self.branch_at_start(model))),)

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"learned_gain": model.d_model}

    def branch_at_start(self, model: Model) -> float:
        start = model.option(LayerScaleOptions).start
        if start is not None:
            return start
        return next((start for layers, start in STARTS if model.n_layers <= layers), DEEPEST)

    def plain_value(self, added: Added) -> Array:
        return np.ones(added.start.shape)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        return super().write(chunks, branch * added["gain"].to(branch.dtype), added)

    def trained_gains(self, model: Model, sublayer: int, added: "Mapping[str, Tensor]") -> tuple[float, float]:
        return 1.0, 1.0

    def trained_scale(self, added: "Mapping[str, Tensor]") -> "Tensor":
        return added["gain"]


LAYERSCALE = Method(
    "layerscale",
    "Touvron et al., Going Deeper with Image Transformers, ICCV 2021",
    {"stream": "layerscale"},
    (LayerScale(),),
    (LayerScaleOptions,),
)
