"""Mix-LN: Post-LN in the first layers, Pre-LN in the others (Li et al. 2024, arXiv 2412.13795)."""

from dataclasses import dataclass
from typing import ClassVar

from stablelm.key import Range, key
from stablelm.methods.axes import Method, MethodOptions, Model, Placement


@dataclass(frozen=True)
class MixLnOptions(MethodOptions):
    """Options of placement: mix_ln."""

    SECTION: ClassVar[str] = "mix_ln"

    share: float = key(
        0.25,
        "share of the layers, the first ones, that have Post-LN; rounded down, at least one layer",
        identity=True,
        range=Range("above 0 and at most 1", lambda v: 0 < v <= 1),
    )


POST = Placement("mix_ln", after_write=True)


@dataclass(frozen=True)
class Mix(Placement):
    """Its own fields are Pre-LN's, those of the later layers."""

    layers_differ: ClassVar[bool] = True

    def at(self, model: Model, sublayer: int) -> Placement:
        return POST if sublayer // 2 < self.post_layers(model) else self

    def used(self) -> tuple[Placement, ...]:
        return POST, self

    def post_layers(self, model: Model) -> int:
        """floor(share n_layers), as the released scripts have 3 of 12 and 6 of 24; one at least (ours)."""
        return max(1, int(model.option(MixLnOptions).share * model.n_layers))


MIX_LN = Method(
    "mix_ln",
    "Li et al., Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN, ICLR 2025",
    {"placement": "mix_ln", "norm": "rmsnorm"},
    (Mix("mix_ln", before_body=True, final=True),),
    (MixLnOptions,),
)
