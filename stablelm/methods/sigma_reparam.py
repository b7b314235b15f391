"""sigmaReparam: every matrix divided by its spectral norm (Zhai et al., ICML 2023).

W stands for (gamma / sigma) W with sigma = v^T W u; u, v constant, so that the gradient passes through sigma (eq. 1 and
released code). u, v and sigma are refreshed by one power iteration after each optimizer step (`methods.spectral`,
called by `engine.after_step`), never in forward, which recompute runs twice and which reads no matrix for them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stablelm.key import key
from stablelm.methods.axes import Init, Method, MethodOptions, Model, Refusal, Reparam, Role

if TYPE_CHECKING:
    from torch import Tensor

ZHAI = "Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, ICML 2023"


@dataclass(frozen=True)
class SigmaOptions(MethodOptions):
    """Options of reparam: sigma."""

    SECTION: ClassVar[str] = "sigma"

    targets: Literal["all", "attention"] = key(
        "all", "matrices of the layers that are reparametrised: all, or those of attention", identity=True
    )
    gamma: Literal["spectral", "one"] = key(
        "spectral", "start of the gain: the spectral norm of the start, which keeps the function, or 1", identity=True
    )


@dataclass(frozen=True)
class Sigma(Reparam):
    name: ClassVar[str] = "sigma"
    after_step: ClassVar[bool] = True

    def refusals(self, model: Model) -> Iterable[Refusal]:
        init = model.axes.init
        if model.option(SigmaOptions).gamma == "one" and init.sizes_branches:
            yield Refusal(
                ("model.sigma.gamma", "model.init"),
                "a spectral norm of 1 at the start erases the sizes that this initialisation sets; "
                "use model.sigma.gamma=spectral, or model.init=xavier, fan_in or gpt2",
            )
        if any(map(init.starts_at_zero, ("query", "key", "value", "output", "fc1", "fc2"))):
            yield Refusal(
                ("model.reparam", "model.init"),
                "this initialisation starts queries at zero, and a zero matrix has no spectral norm to divide by; "
                "use model.reparam=none",
            )

    def applies(self, model: Model, sublayer: int) -> bool:
        return sublayer % 2 == 0 or model.option(SigmaOptions).targets == "all"

    def parameters(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"gamma": (1,)}

    def buffers(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"u": (d_in,), "v": (d_out,)}

    def derived(self) -> dict[str, tuple[int, ...]]:
        return {"sigma": (1,)}

    def derive(self, matrices: Sequence[Any], reduce: Any) -> None:
        from stablelm.methods import spectral

        spectral.find_sigma(matrices, reduce)

    def starts(self, weight: "Tensor", model: Model, top: Any) -> "dict[str, Tensor]":
        import torch

        found = top(weight)
        keeps = model.option(SigmaOptions).gamma == "spectral"
        gain = found.sigma if keeps else float(found.sigma > 0)
        return {"gamma": torch.full((1,), gain, dtype=torch.float64), "u": found.u, "v": found.v}

    def factor(self, linear: Any) -> "Tensor":
        """gamma / sigma, in the parameters' dtype."""
        from stablelm.methods import spectral

        return linear.gamma / spectral.differentiable_sigma(linear)

    def quotient(self, linear: Any) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
        return linear.gamma, linear.sigma, linear.v, linear.u

    def keeps_start(self, model: Model) -> bool:
        return model.option(SigmaOptions).gamma == "spectral"

    def entry_variance(self, model: Model, std: float, shape: tuple[int, int]) -> float:
        """With gamma one, what is left when the spectral norm, std (sqrt(d_out) + sqrt(d_in)), is divided out."""
        if model.option(SigmaOptions).gamma == "spectral":
            return std**2
        return (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** -2

    def update(self, matrices: Sequence[Any], reduce: Any) -> None:
        from stablelm.methods import spectral

        spectral.refresh(matrices, reduce)


@dataclass(frozen=True)
class NormalInit(Init):
    """One std for all matrices and tables, whatever they do and however deep the model is (released vision code)."""

    name: ClassVar[str] = "normal"

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        return 0.02

    def embedding_std(self, model: Model) -> float:
        return 0.02

    def head_std(self, model: Model) -> float:
        return 0.02


DEFAULTS = {"reparam": "sigma"}
SIGMA_REPARAM = Method("sigma_reparam", ZHAI, DEFAULTS, (Sigma(),), (SigmaOptions,))
SIGMA_REPARAM_NONORM = Method(
    "sigma_reparam_nonorm", ZHAI, {**DEFAULTS, "placement": "none", "init": "normal"}, (NormalInit(),)
)
