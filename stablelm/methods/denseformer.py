"""DenseFormer: layers' outputs become learned sums of outputs so far (Pagliardini et al., NeurIPS 2024)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import AT_LEAST_1, key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, Refusal, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class DenseformerOptions(MethodOptions):
    """Options of stream: dense."""

    SECTION: ClassVar[str] = "denseformer"

    dilation: int = key(
        1, "a sum reads every dilation-th output, counted back from its own layer's", identity=True, range=AT_LEAST_1
    )
    period: int = key(1, "every period-th layer is followed by a sum", unit="layers", identity=True, range=AT_LEAST_1)


@dataclass(frozen=True)
class Dense(Stream):
    """The stream, then the embedding and every layer's output; the weights start with the newest output alone.

    `dilation`: as the option, once the stream is made for a model.
    """

    dilation: int = 1

    name: ClassVar[str] = "dense"
    layers_differ: ClassVar[bool] = True

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        skip, branch = self.gains(model) if sublayer is None else self.gains_in(model, sublayer)
        return Dense(skip, branch, dilation=model.option(DenseformerOptions).dilation)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if model.option(DenseformerOptions).period > model.n_layers:
            yield Refusal(
                ("model.denseformer.period", "model.n_layers"),
                f"no layer would be followed by a sum; use a period of at most {model.n_layers}, or "
                "model.stream=residual",
            )

    def in_layer(self, model: Model, layer: int) -> tuple[Added, ...]:
        """A weight for each output that the sum reads, the layer's own as the last."""
        options = model.option(DenseformerOptions)
        if (layer + 1) % options.period:
            return ()
        return (Added("mix", np.eye((layer + 1) // options.dilation + 1)[-1]),)

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded, embedded)

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        return (new[0], *chunks[1:], *new[1:])

    def end_layer(self, chunks: "Chunks", new: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        """The weighted sum, which is the stream, and the layer's own output, which later sums read."""
        output, weights = new[0], added.get("mix")
        if weights is None:
            return output, output
        outputs = (*chunks[1:], output)
        read = outputs[(len(outputs) - 1) % self.dilation :: self.dilation]
        total = output.new_zeros(output.shape)
        for weight, each in zip(weights.to(output.dtype).unbind(), read, strict=True):
            total = total.addcmul(each, weight)
        return total, output

    def export_obstacle(self, model: Model) -> str:
        return "its layers read weighted sums of all earlier ones, which no standard architecture does"

    def modelling(self, model: Model) -> dict[str, Any]:
        options = model.option(DenseformerOptions)
        return {"mixes_outputs": True, "mix_dilation": options.dilation, "mix_period": options.period}


DENSEFORMER = Method(
    "denseformer",
    "Pagliardini et al., DenseFormer: Enhancing Information Flow via Depth Weighted Averaging, NeurIPS 2024",
    {"stream": "dense", "init": "gpt2"},
    (Dense(),),
    (DenseformerOptions,),
)
