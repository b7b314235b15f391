"""Keel: Post-LN whose skip outweighs the branch as a highway (Chen & Wei 2026, arXiv 2601.19895)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from stablelm.key import ABOVE_0, key
from stablelm.methods.axes import Method, MethodOptions, Model, Placement, Refusal, Stream


@dataclass(frozen=True)
class KeelOptions(MethodOptions):
    """Options of stream: keel."""

    SECTION: ClassVar[str] = "keel"

    alpha: float | None = key(
        None,
        "factor of the skip in all layers but the first; None: the number of sub-layers, 2 n_layers",
        identity=True,
        range=ABOVE_0,
    )


@dataclass(frozen=True)
class Keel(Stream):
    """alpha x + f(x), in the first layer x + f(x) (eq. 8 and section 3.1)."""

    name: ClassVar[str] = "keel"
    layers_differ: ClassVar[bool] = True

    def gains(self, model: Model) -> tuple[float, float]:
        alpha = model.option(KeelOptions).alpha
        return 2.0 * model.n_layers if alpha is None else alpha, 1.0

    def gains_in(self, model: Model, sublayer: int) -> tuple[float, float]:
        return (1.0, 1.0) if sublayer < 2 else self.gains(model)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not model.axes.placement.used()[-1].after_write:
            yield Refusal(
                ("model.stream", "model.placement"),
                "keel multiplies the skip of every layer but the first, so without a norm after the sum the stream "
                "explodes; use model.placement=keel or post, or model.stream=residual",
            )


FIRST = Placement("keel", before_body=True)


@dataclass(frozen=True)
class InAndAfter(Placement):
    """Norms before each body and, but for the first layer, after each sum; a final one (section 3.1, figure 2)."""

    layers_differ: ClassVar[bool] = True

    def at(self, model: Model, sublayer: int) -> Placement:
        return FIRST if sublayer < 2 else self

    def used(self) -> tuple[Placement, ...]:
        return FIRST, self


KEEL = Method(
    "keel",
    "Chen & Wei, Post-LayerNorm Is Back: Stable, ExpressivE, and Deep, 2026",
    {"stream": "keel", "placement": "keel", "norm": "rmsnorm"},
    (Keel(), InAndAfter("keel", before_body=True, after_write=True, final=True)),
    (KeelOptions,),
)
