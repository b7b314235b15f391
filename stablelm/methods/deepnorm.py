"""DeepNorm: a larger skip before a norm after the sum (Wang et al., DeepNet, 2022)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import BRANCH_MATRICES, Init, Method, Model, Refusal, Role, Stream
from stablelm.methods.pre_ln import glorot


@dataclass(frozen=True)
class DeepNormStream(Stream):
    """alpha x + f(x) with alpha = (2 n_layers)^(1/4) (section 3, decoder-only)."""

    name: ClassVar[str] = "deepnorm"

    def gains(self, model: Model) -> tuple[float, float]:
        return (2 * model.n_layers) ** 0.25, 1.0

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not all(at.after_write for at in model.axes.placement.used()):
            yield Refusal(
                ("model.stream", "model.placement"),
                "deepnorm multiplies the skip at every sub-layer, so without a norm after the sum the stream explodes; "
                "use model.placement=post, or model.stream=scaled",
            )


@dataclass(frozen=True)
class DeepNetInit(Init):
    name: ClassVar[str] = "deepnet"
    sizes_branches: ClassVar[bool] = True

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Glorot's std, times (8 n_layers)^(-1/4) for value, output, fc1, gate, fc2 (section 3, decoder-only)."""
        return glorot(shape) * ((8 * model.n_layers) ** -0.25 if role.kind in BRANCH_MATRICES else 1)

    def embedding_scale(self, model: Model) -> float:
        """sqrt(d_model), as in fairseq's language models: the stream starts with unit variance."""
        return math.sqrt(model.d_model)


DEEPNORM = Method(
    "deepnorm",
    "Wang et al., DeepNet: Scaling Transformers to 1,000 Layers, 2022",
    {"stream": "deepnorm", "placement": "post", "init": "deepnet"},
    (DeepNormStream(), DeepNetInit()),
)
