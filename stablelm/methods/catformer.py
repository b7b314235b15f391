"""Catformer: the stream is every output so far, side by side (Davis et al., ICML 2021).

The paper compares models of equal size. How the widths are chosen for it is ours: the growth of the stream is solved so
that the parameters are those of a residual model.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.key import ABOVE_0, AT_LEAST_1, key
from stablelm.methods.axes import Init, M, Method, MethodOptions, Model, Refusal, Role, Stream, Widths
from stablelm.methods.deepscalelm import solved_std
from stablelm.methods.roles import Array
from stablelm.methods.sizes import parameter_counts
from stablelm.methods.solve import solve
from stablelm.theory.sensitivity import concat_shares

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks

DAVIS = "Davis et al., Catformer: Designing Stable Transformers via Sensitivity Analysis, ICML 2021"
TOLERANCE = 0.01
MERGED = 16


@dataclass(frozen=True)
class CatformerOptions(MethodOptions):
    """Options of stream: concat."""

    SECTION: ClassVar[str] = "catformer"

    growth: int | None = key(
        None,
        "width that each sub-layer adds; None: solved for the parameters of a residual model",
        identity=True,
        range=AT_LEAST_1,
    )
    d_attention: int | None = key(
        None, "width of all heads together; None: attention_expansion times growth", identity=True, range=AT_LEAST_1
    )
    attention_expansion: float = key(4.0, "target d_attention / growth", identity=True, range=ABOVE_0)
    feedforward_expansion: float = key(8.0, "target d_ff / growth", identity=True, range=ABOVE_0)


@dataclass(frozen=True)
class Concat(Stream):
    """Each sub-layer appends one chunk."""

    name: ClassVar[str] = "concat"
    grows: ClassVar[bool] = True
    layers_differ: ClassVar[bool] = True

    def widths(self, model: Model, sublayer: int) -> Widths:
        options = model.option(CatformerOptions)
        assert options.growth is not None
        assert options.d_attention is not None
        return Widths(model.d_model + sublayer * options.growth, options.d_attention, options.growth)

    def sized(self, model: M) -> M:
        """Growth, d_attention and d_ff nearest to the target expansions, within 1 % of a residual twin's parameters."""
        return _sized(model)

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if any(at.after_write for at in model.axes.placement.used()):
            yield Refusal(
                ("model.stream", "model.placement"),
                "a concatenated stream has no sum to normalise; use model.placement=pre, sub or peri",
            )
        d_attention = model.option(CatformerOptions).d_attention
        unit = head_unit(model)
        if d_attention is not None and d_attention % unit:
            below = d_attention // unit * unit
            fits = " or ".join(str(width) for width in (below, below + unit) if width)
            yield Refusal(
                ("model.catformer.d_attention", "model.n_heads"),
                f"the width must be divisible by {unit}, for heads of {'even' if unit > model.n_heads else 'equal'} "
                f"width; use {fits}",
            )

    def sensitivity_shares(self, model: Model, variances: Array, embedding_variance: float) -> Array:
        return concat_shares(variances, model.d_model, self.widths(model, 0).branch, embedding_variance)

    def read(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        return self.finish(chunks)

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        from stablelm.methods.concatenation import Concatenation

        return chunks.append(branch) if isinstance(chunks, Concatenation) else (branch.to(chunks[0].dtype),)

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        from stablelm.methods.concatenation import Concatenation

        return Concatenation(*new) if isinstance(chunks, Concatenation) else chunks + new

    def settle(self, chunks: "Chunks") -> "Chunks":
        """Merges 16 chunks of equal width at a time: reading hundreds is slow."""
        import torch

        from stablelm.methods.concatenation import Concatenation

        if isinstance(chunks, Concatenation):
            return chunks
        while len(chunks) >= MERGED and len({chunk.shape[-1] for chunk in chunks[-MERGED:]}) == 1:
            chunks = (*chunks[:-MERGED], torch.cat(chunks[-MERGED:], dim=-1))
        return chunks

    def state(self, chunks: "Chunks") -> "Chunks":
        return chunks

    def finish(self, chunks: "Chunks") -> "Tensor":
        import torch

        from stablelm.methods.concatenation import Concatenation

        return chunks.stream if isinstance(chunks, Concatenation) else torch.cat(chunks, dim=-1)

    def export_obstacle(self, model: Model) -> str:
        return "its stream is a concatenation of all outputs so far, which no standard architecture has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"growth": model.option(CatformerOptions).growth}


@dataclass(frozen=True)
class UnitInit(Init):
    name: ClassVar[str] = "unit"
    sizes_branches: ClassVar[bool] = True
    solved: ClassVar[bool] = True
    unit_variance: ClassVar[bool] = True

    def std(self, role: Role, shape: Any, model: Model) -> float:
        """Branches of unit variance, by the last matrix of each (ours): `methods.solve`."""
        return solved_std(role, solve(model))


def head_unit(model: Model) -> int:
    """What the width of all heads must be divisible by: n_heads, doubled if each head's width must be even."""
    return model.n_heads * (2 if model.axes.position.pairs_features else 1)


@lru_cache(maxsize=64)
def _sized(model: M) -> M:
    """Among the shapes within 1 % of the residual twin, the one nearest to the wanted expansions; the nearest in
    parameters if there is none."""
    target = _body(_residual_twin(model))
    best: tuple[float, M] | None = None
    for growth in _growths(model):
        for d_attention in _attention_widths(model, growth):
            shape = _with_d_ff(model, growth, d_attention, target)
            if shape is None:
                continue
            error = abs(_body(shape) / target - 1)
            cost = _unlike(shape, model) if error <= TOLERANCE else 1e3 * (1 + error)
            if best is None or cost < best[0]:
                best = (cost, shape)
    assert best is not None, "growth 1 and the narrowest heads always give a shape"
    return best[1]


def _body(model: Model) -> int:
    """All but the embeddings and the head, so with the projection from the whole stream to d_model."""
    counts = parameter_counts(model)
    return counts["total"] - counts["embedding"] - counts["head"]


def _residual_twin(model: M) -> M:
    return model.changed(stream="residual", d_ff=model.axes.activation.d_ff(model.d_model))


def _growths(model: Model) -> range | list[int]:
    """Candidates around the solution of the equation without norms and rounding."""
    growth = model.option(CatformerOptions).growth
    if growth is not None:
        return [growth]
    n, d, e_a, e_f = model.n_layers, model.d_model, *_expansions(model)
    matrices = 3 if model.axes.activation.gated else 2
    a = (3 * e_a + (matrices - 1) * e_f) * n * n + (e_a + e_f) * n
    b = (3 * e_a + (matrices - 1) * e_f) * n * d + 2 * d
    guess = (-b + math.sqrt(b * b + 48 * a * n * d * d)) / (2 * a)
    return range(max(1, int(guess * 0.6)), max(4, math.ceil(guess * 1.3)) + 1)


def _expansions(model: Model) -> tuple[float, float]:
    options = model.option(CatformerOptions)
    return options.attention_expansion, options.feedforward_expansion


def _attention_widths(model: Model, growth: int) -> list[int]:
    """Widths near the wanted one that the heads divide, each head's even where rope halves it."""
    options, unit = model.option(CatformerOptions), head_unit(model)
    if options.d_attention is not None:
        return [options.d_attention]
    wanted = options.attention_expansion * growth / unit
    return sorted({unit * max(1, round(wanted) + step) for step in (-1, 0, 1)})


def _with_d_ff(model: M, growth: int, d_attention: int, target: int) -> M | None:
    """The shape whose d_ff, unless it is given, comes nearest to the target; None if even 1 is too much."""
    options = replace(model.option(CatformerOptions), growth=growth, d_attention=d_attention)
    shape = model.changed(options)
    if model.d_ff is not None:
        return shape
    one, two = (_body(shape.changed(d_ff=d_ff)) for d_ff in (1, 2))
    d_ff = 1 + round((target - one) / (two - one))
    return shape.changed(d_ff=max(1, d_ff)) if d_ff >= 1 or growth == 1 else None


def _unlike(shape: Model, model: Model) -> float:
    """Distance of a shape's expansions from the wanted ones."""
    options, d_ff = shape.option(CatformerOptions), shape.d_ff
    growth, d_attention = options.growth, options.d_attention
    assert growth and d_attention and d_ff
    e_a, e_f = _expansions(model)
    return abs(math.log(d_attention / (e_a * growth))) + abs(math.log(d_ff / (e_f * growth)))


DEFAULTS = {"stream": "concat", "init": "unit"}
CATFORMER = Method("catformer", DAVIS, DEFAULTS, (Concat(), UnitInit()), (CatformerOptions,))
