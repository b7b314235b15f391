"""Value residuals: later layers also see the first layer's values (Zhou et al., ACL 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stablelm.key import key
from stablelm.methods.axes import Added, Method, MethodOptions, Model, ValueMixing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ValueResidualOptions(MethodOptions):
    """Options of attention.value_residual."""

    SECTION: ClassVar[str] = "value_residual"

    learned: bool = key(
        False, "the halves of the first layer's and the own values are the start of two learned weights a layer",
        identity=True,
    )  # fmt: skip


@dataclass(frozen=True)
class ValueResidual(ValueMixing):
    """V_l <- lambda_l1 V_1 + lambda_l2 V_l in all layers but the first, both weights 1/2 at the start."""

    name: ClassVar[str] = "first"
    share: ClassVar[float | None] = 0.5

    def asked(self, model: Model) -> bool:
        return bool(model.attention.value_residual)

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        learned = layer > 0 and model.option(ValueResidualOptions).learned
        return (Added("value_weights", np.full(2, 0.5)),) if learned else ()

    def mix(self, own: "Tensor", first: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        weights = added.get("value_weights")
        if weights is None:
            return 0.5 * (own + first)
        of_first, of_own = weights.to(own.dtype).unbind()
        return of_first * first + of_own * own

    def modelling(self, model: Model) -> dict[str, Any]:
        learned = model.option(ValueResidualOptions).learned
        return {"first_value_share": self.share, "learned_value_weights": learned}


VALUE_RESIDUAL = Method(
    "value_residual",
    "Zhou et al., Value Residual Learning, ACL 2025",
    {"attention.value_residual": True},
    (ValueResidual(),),
    (ValueResidualOptions,),
)
