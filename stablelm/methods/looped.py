"""Stacks whose layers run more than once: Universal Transformers, and the two orders of sharing.

Dehghani et al., Universal Transformers, ICLR 2019 (section 2: one layer, run again and again); Csordas et al., MoEUT,
NeurIPS 2024 (section 2.4: a group of layers repeated as a whole, here without its experts); Takase & Kiyono, Lessons on
Parameter Sharing across Layers in Transformers, 2021 (section 2: `sequence` and `cycle`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from stablelm.key import Range, key
from stablelm.methods.axes import M, Method, MethodOptions, Model, Refusal, Stack
from stablelm.methods.pre_ln import OwnLayers

AT_LEAST_2 = Range("at least 2", lambda v: v >= 2)


@dataclass(frozen=True)
class SharedOptions(MethodOptions):
    """Options of stack: cycle and sequence."""

    SECTION: ClassVar[str] = "shared"

    repeats: int = key(
        2,
        "places of the stack that each layer takes; n_layers counts the places, and the last layers take fewer where "
        "it is no multiple",
        identity=True,
        range=AT_LEAST_2,
    )


class Shared(Stack):
    """Layers of which each runs at `repeats` places."""

    shared: ClassVar[bool] = True

    def distinct(self, model: Model) -> int:
        return -(-model.n_layers // model.option(SharedOptions).repeats)

    def unshared(self, model: M) -> M:
        return model.changed(stack=OwnLayers.name)

    def theory_gap(self, model: Model) -> str:
        return "the weights of all places are taken as independent, and shared layers have the same ones at several"

    def refusals(self, model: Model) -> Iterable[Refusal]:
        axes, places = model.axes, range(model.n_layers)
        if axes.stream.grows or axes.stream.layers_differ:
            yield Refusal(
                ("model.stack", "model.stream"),
                "its layers have parameters of other shapes at each depth, which no layer can share; "
                "use model.stream=residual",
            )
        elif any(axes.stream.eps_scale(model, 2 * place) != axes.stream.eps_scale(model, 0) for place in places):
            yield Refusal(
                ("model.stack", "model.stream"),
                "the eps of its norms differs with the depth, and a shared layer has one; leave the eps alone",
            )
        if any(axes.placement.input_scale(place) != axes.placement.input_scale(0) for place in places):
            yield Refusal(
                ("model.stack", "model.placement"),
                "its norms are scaled by the depth, and a shared layer has several; use model.placement=pre",
            )
        if axes.shaping.active:
            yield Refusal(
                ("model.stack", "model.attention.shaping"),
                "its bias differs with the depth, and a shared layer has several; use model.attention.shaping=none",
            )
        if axes.value_mixing.share is not None:
            yield Refusal(
                ("model.stack", "model.attention.value_residual"),
                "the first layer, which gives its values to the others, would also be one of these; "
                "use model.attention.value_residual=false",
            )

    def import_obstacle(self, model: Model) -> str:
        return "its layers are shared, and those of a plain model are all different"


@dataclass(frozen=True)
class Cycle(Shared):
    """1 2 3 1 2 3: the whole group again and again."""

    name: ClassVar[str] = "cycle"

    def layer_at(self, model: Model, place: int) -> int:
        return place % self.distinct(model)


@dataclass(frozen=True)
class Sequence(Shared):
    """1 1 2 2 3 3: each layer several times in a row."""

    name: ClassVar[str] = "sequence"

    def layer_at(self, model: Model, place: int) -> int:
        return place // model.option(SharedOptions).repeats


LOOPED = Method(
    "looped",
    "Dehghani et al., Universal Transformers, ICLR 2019",
    {"stack": "cycle"},
    (Cycle(), Sequence()),
    (SharedOptions,),
)
