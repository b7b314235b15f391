"""Sizes of the models of a study: widths at each depth so that all have as many parameters, or as they were given."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import apply_method
from stablelm.methods.sizes import parameter_counts, stream_width
from stablelm.study.study_file import DEPTH, Study

FF_STEP = 8
WIDEST = 65_536
TRIALS = 6


@dataclass(frozen=True)
class Shape:
    """A depth and widths, `d_ff` that of the feed-forward parts' inner features."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int

    def __str__(self) -> str:
        return f"{self.n_layers}x{self.d_model}"

    def keys(self) -> dict[str, int]:
        return {f"model.{name}": value for name, value in vars(self).items()}


def shapes_of(study: Study, model: ModelConfig, depth: int | None) -> Iterator[Shape]:
    """The shape at a depth, or each of a list, for a model whose other keys are those of a cell.

    `model` has every size that parameters depend on but depth and widths: vocabulary, longest sequence, method.
    Raises ConfigError where no width has the parameters that were asked for.
    """
    own = study.shapes
    if own.rule == "list":
        pairs = [tuple(map(int, each.split("x"))) for each in own.list_ or []]
        yield from (_plain(study, layers, width) for layers, width in pairs)
        return
    assert depth is not None
    if own.rule == "fixed_width":
        assert own.d_model is not None
        yield _plain(study, depth, own.d_model)
    else:
        yield _of_equal_parameters(study, model, depth)


def counted(study: Study, model: ModelConfig) -> int:
    """The parameters that `shapes.count` counts, of a model whose sizes are all known.

    The projection at the end of a stream that grows counts as a layer's.
    """
    counts = parameter_counts(model)
    if study.shapes.count == "all":
        return counts["total"]
    return counts["layers"] + model.axes.stream.grows * stream_width(model, model.n_layers) * model.d_model


def with_shape(model: ModelConfig, shape: Shape) -> ModelConfig:
    """A model with that shape and with what its method and stream make of it. Raises ConfigError."""
    sized = replace(model, n_layers=shape.n_layers, d_model=shape.d_model, n_heads=shape.n_heads, d_ff=shape.d_ff)
    applied = apply_method(sized)
    applied = replace(applied, kv_heads=applied.kv_heads or applied.n_heads)
    return applied.axes.stream.sized(applied)


def _plain(study: Study, layers: int, width: int) -> Shape:
    own = study.shapes
    if width % own.d_head or width < 2 * own.d_head:
        raise ConfigError(
            f"shapes: width {width} is not two or more heads of shapes.d_head={own.d_head}; change one of them "
            f"({study.at('shapes')})"
        )
    return Shape(layers, width, width // own.d_head, _feedforward(own.ff_ratio * width))


def _feedforward(width: float) -> int:
    return max(FF_STEP, FF_STEP * round(width / FF_STEP))


def _of_equal_parameters(study: Study, model: ModelConfig, depth: int) -> Shape:
    """The width whose parameters are nearest to those asked for, its feed-forward parts trimmed where they must be."""
    own = study.shapes
    wanted = own.parameters
    assert wanted is not None
    step = math.lcm(own.d_head, own.multiple)
    least = step * math.ceil(2 * own.d_head / step)

    def count(shape: Shape) -> int:
        return counted(study, with_shape(model, shape))

    tried: list[Shape] = []
    for width in range(least, WIDEST + 1, step):
        tried.append(_plain(study, depth, width))
        if count(tried[-1]) >= wanted:
            break
    near = sorted(tried[-2:], key=lambda shape: abs(count(shape) - wanted))
    for shape in (*near, *(_trimmed(shape, wanted, count) for shape in near)):
        if abs(count(shape) - wanted) <= own.tolerance * wanted:
            return shape
    best = min((_trimmed(shape, wanted, count) for shape in near), key=lambda shape: abs(count(shape) - wanted))
    raise ConfigError(
        f"shapes: at depth {depth} no width in steps of {step}, from {least} up, has {wanted:,} parameters within "
        f"{own.tolerance:.0%}: the nearest, {best} with d_ff {best.d_ff}, has {count(best):,}; change "
        f"shapes.parameters, d_head or multiple, or leave out the depth ({study.at(f'grid.{DEPTH}')})"
    )


def _trimmed(shape: Shape, wanted: int, count: Callable[[Shape], int]) -> Shape:
    """The feed-forward width, in steps of 8, that comes nearest; parameters are nearly linear in it."""
    tried = {shape: count(shape)}
    for _ in range(TRIALS):
        each = count(replace(shape, d_ff=shape.d_ff + FF_STEP)) - count(shape)
        moved = FF_STEP * round((wanted - count(shape)) / each) if each else 0
        shape = replace(shape, d_ff=max(FF_STEP, shape.d_ff + moved))
        if shape in tried:
            break
        tried[shape] = count(shape)
    return min(tried, key=lambda each: abs(tried[each] - wanted))
