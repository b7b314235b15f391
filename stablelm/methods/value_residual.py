"""Value residuals: later layers also see the first layer's values (Zhou et al., ACL 2025, fixed shares of 1/2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.axes import Method, Model, ValueMixing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ValueResidual(ValueMixing):
    name: ClassVar[str] = "first"
    share: ClassVar[float | None] = 0.5

    def asked(self, model: Model) -> bool:
        return bool(model.attention.value_residual)

    def mix(self, own: "Tensor", first: "Tensor") -> "Tensor":
        return 0.5 * (own + first)

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"first_value_share": self.share}

    def moments(self, kept: float, common: float) -> tuple[float, float]:
        # Half the first layer's values, half the own: of independent weights, so the variances add.
        return 0.5 * kept, 0.5 * common


VALUE_RESIDUAL = Method(
    "value_residual",
    "Zhou et al., Value Residual Learning, ACL 2025",
    {"attention.value_residual": True},
    (ValueResidual(),),
)
