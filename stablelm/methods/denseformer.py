"""DenseFormer: each layer's output becomes a learned sum of all outputs so far (Pagliardini et al., NeurIPS 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.methods.axes import Added, Method, Model, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class Dense(Stream):
    """The stream, then the embedding and every layer's output; the weights start with the newest output alone."""

    name: ClassVar[str] = "dense"
    layers_differ: ClassVar[bool] = True

    def in_layer(self, model: Model, layer: int) -> tuple[Added, ...]:
        return (Added("mix", np.eye(layer + 2)[-1]),)

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded, embedded)

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        return (new[0], *chunks[1:], *new[1:])

    def end_layer(self, chunks: "Chunks", new: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        """The weighted sum, which is the stream, and the layer's own output, which later sums read."""
        output, weights = new[0], added["mix"]  # weights: (outputs so far with this one,)
        outputs = (*chunks[1:], output)
        total = output.new_zeros(output.shape)
        for weight, each in zip(weights.to(output.dtype).unbind(), outputs, strict=True):
            total = total.addcmul(each, weight)
        return total, output

    def export_obstacle(self, model: Model) -> str:
        return "its layers read weighted sums of all earlier ones, which no standard architecture does"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"mixes_outputs": True}


DENSEFORMER = Method(
    "denseformer",
    "Pagliardini et al., DenseFormer: Enhancing Information Flow via Depth Weighted Averaging, NeurIPS 2024",
    {"stream": "dense", "init": "gpt2"},
    (Dense(),),
)
