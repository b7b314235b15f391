"""Admin: Post-LN whose skips start at the size of all that was written before (Liu et al., EMNLP 2020).

The paper profiles the branches of one batch at the start; here the theory's moments give their variances, so that the
start needs no data and is the same on every rank.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from stablelm.methods.axes import Added, Method, Model, Refusal, Stream
from stablelm.methods.sizes import d_head, d_key_value, widths
from stablelm.methods.stds import map_variance
from stablelm.theory.moments import token_collision

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class LearnedSkip(Stream):
    """w * x + f(x), w (width,) for each sub-layer, all alike at the start (section 4.1, eq. 7)."""

    name: ClassVar[str] = "admin"

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        return (Added("skip", np.full(model.d_model, profiled(model)[sublayer])),)

    def gains_at_start(self, model: Model, sublayer: int) -> tuple[float, float]:
        return profiled(model)[sublayer], 1.0

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        return with_learned_skip(chunks, branch, added["skip"])

    def refusals(self, model: Model) -> Iterable[Refusal]:
        if not all(at.after_write for at in model.axes.placement.used()):
            yield Refusal(
                ("model.stream", "model.placement"),
                "admin multiplies the skip by the size of all that was written before, so without a norm after the sum "
                "the stream explodes; use model.placement=post, or model.stream=residual",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its skips have a learned factor for each feature, which no standard architecture has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"learned_skip": ["attention", "feedforward"]}


def with_learned_skip(chunks: "Chunks", branch: "Tensor", skip: "Tensor") -> "Chunks":
    """skip * x + branch in x's dtype; `skip`: (width,)."""
    import torch

    x = chunks[0]
    return (torch.addcmul(branch.to(x.dtype), x, skip.to(x.dtype)),)


class _Moments(NamedTuple):
    """Variance a feature, and correlation of two tokens."""

    variance: float
    correlation: float


@lru_cache(maxsize=32)
def profiled(model: Model) -> tuple[float, ...]:
    """The start of each sub-layer's w: 1, then the root of w^2 Var[x] + Var[f(x)] of the sub-layer before (released
    code), by a recursion over variance and correlation of the stream; `model` is resolved."""
    stream, skips, values = _embedded(model), [1.0], None
    for index in range(2 * model.n_layers):
        read = _read(model, stream, index)
        branch = _branch(model, read, index, values)
        values = values or _values(model, read, index)  # the first layer's
        kept = skips[-1] ** 2 * stream.variance
        total = kept + branch.variance / (1 - model.dropout)
        correlation = (kept * stream.correlation + branch.variance * branch.correlation) / total
        after = model.axes.placement.at(model, index).after_write
        stream = _Moments(model.axes.norm.variance(model, total, index % 2 == 0) if after else total, correlation)
        skips.append(math.sqrt(total))
    return tuple(skips[:-1])


def _embedded(model: Model) -> _Moments:
    """The stream after the embeddings and their dropout."""
    assert model.vocab_size is not None
    init = model.axes.init
    table = init.embedding_std(model) ** 2
    token = table * (init.embedding_scale(model) * (model.axes.norm.embedding_gain(model) or 1.0)) ** 2
    variance = token + (table if model.axes.position.adds_table else 0.0)
    correlation = (1 - model.dropout) * token / variance * float(token_collision(model.vocab_size))
    variance /= 1 - model.dropout
    return _Moments(model.axes.norm.variance(model, variance, False) if model.embedding_norm else variance, correlation)


def _read(model: Model, stream: _Moments, index: int) -> _Moments:
    placement = model.axes.placement.at(model, index)
    if not placement.before_body:
        return stream
    scale = placement.input_scale(index // 2)
    return _Moments(model.axes.norm.variance(model, stream.variance, index % 2 == 0) * scale**2, stream.correlation)


def _branch(model: Model, read: _Moments, index: int, values: _Moments | None) -> _Moments:
    """What is written, before its dropout; 1 where the initialisation is solved for it. `values`: the first layer's, in
    later layers."""
    found = _feedforward(model, read, index) if index % 2 else _attention(model, read, index, values)
    if model.axes.init.solved:
        return _Moments(1 - model.dropout, found.correlation)
    if model.axes.placement.at(model, index).on_branch:
        return _Moments(model.axes.norm.variance(model, found.variance, index % 2 == 0), found.correlation)
    return found


def _product(model: Model, read: _Moments, index: int, kind: str, rows: int) -> float:
    """Variance of what a first map gives; 1 where the initialisation is solved."""
    fan_in = widths(model, index).read
    return 1.0 if model.axes.init.solved else read.variance * fan_in * map_variance(model, kind, index, fan_in, rows)


def _values(model: Model, read: _Moments, index: int) -> _Moments:
    return _Moments(_product(model, read, index, "value", d_key_value(model)), read.correlation)


def _attention(model: Model, read: _Moments, index: int, first: _Moments | None) -> _Moments:
    width, size, r = widths(model, index), d_head(model), read.correlation
    query = _product(model, read, index, "query", width.attention)
    key = _product(model, read, index, "key", d_key_value(model))
    logits = model.axes.init.logit_scale(size) ** 2 * size * (1.0 if model.attention.qk_norm else query * key)
    own, shared = model.axes.position.mean_weights(model, (1 - r) * logits)
    own /= 1 - model.dropout
    share, values = model.axes.value_mixing.share, _values(model, read, index)
    parts = [(1.0, values)] if first is None or share is None else [((1 - share) ** 2, values), (share**2, first)]
    kept, common = (
        sum(part * of.variance * (of.correlation + (1 - of.correlation) * weight) for part, of in parts)
        for weight in (own, shared)
    )
    inside = 1.0 if model.axes.placement.at(model, index).before_output else kept
    solved = model.axes.init.solved
    last = 1.0 if solved else width.attention * map_variance(model, "output", index, width.attention, width.branch)
    return _Moments(inside * last, min(1.0, common / kept))


def _feedforward(model: Model, read: _Moments, index: int) -> _Moments:
    width, activation = widths(model, index), model.axes.activation
    correlation = activation.correlation(read.correlation)
    if model.axes.init.solved:
        return _Moments(1.0, correlation)
    assert model.d_ff is not None
    hidden = read.variance * width.read * map_variance(model, "fc1", index, width.read, model.d_ff)
    inside = activation.second_moment(hidden)
    if activation.gated:
        gate = read.variance * width.read * map_variance(model, "gate", index, width.read, model.d_ff)
        inside = activation.second_moment(gate) / gate * hidden
    if model.axes.placement.at(model, index).before_output:
        inside = 1.0
    return _Moments(inside * model.d_ff * map_variance(model, "fc2", index, model.d_ff, width.branch), correlation)


ADMIN = Method(
    "admin",
    "Liu et al., Understanding the Difficulty of Training Transformers, EMNLP 2020",
    # Embeddings of variance 1, as the released code has them.
    {"stream": "admin", "placement": "post", "init": "fan_in"},
    (LearnedSkip(),),
)
