"""Matrices whose branches have unit variance, solved from the moments: for the inits `deepscale` and `unit`.

A recursion over the sub-layers in float64 follows variance and token correlation of the stream, given that every
branch has variance 1 after dropout, and asks for the stds that make it so.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from stablelm.methods.axes import Model
from stablelm.methods.sizes import d_head, widths
from stablelm.theory.moments import Function, token_collision

# Kedia et al. 2024, released code: BERT's embeddings with segments.
LITERAL_CORRELATION = 0.221


@dataclass(frozen=True)
class Reading:
    """What a sub-layer reads, after its norm: variance per feature, correlation of two tokens."""

    variance: float
    correlation: float


@dataclass(frozen=True)
class Averaged:
    """Variance and covariance of two tokens of what attention makes of values: `own` (variance, covariance) per unit of
    the own values' variance, and `first` those that the first layer's values add."""

    own: tuple[float, float]
    first: tuple[float, float] = (0.0, 0.0)

    def correlation(self, value_variance: float) -> float:
        """Of two tokens, for own values of that variance."""
        variance, covariance = (own * value_variance + first for own, first in zip(self.own, self.first, strict=True))
        return covariance / variance


@lru_cache(maxsize=32)
def solve(model: Model, *, shared: bool = False, literal: bool = False) -> tuple[dict[str, float], ...]:
    """Stds of each sub-layer's matrices by role kind, in order of depth; `model` is resolved.

    All have 1 / sqrt(fan_in) but the last matrix of a branch, which is solved; `shared` (Kedia et al. 2024, section 4
    and released code): value and output share one std, fc1 and fc2 another, query and key have 1 / sqrt(fan_in).
    `literal` keeps the encoder's recursion, where attention gives the tokens' common part alone; without (ours) the
    positions that have few keys count: `moments.causal_means`.
    """
    variance, correlation = _start(model, literal)
    stds, values = [], None
    for index in range(2 * model.n_layers):
        reading = Reading(_read_variance(model, variance, index), correlation)
        if index % 2 == 0:
            averaged = _attention(model, reading, values, literal)
            stds.append(_attention_stds(model, reading, averaged, index, shared))
            own = Reading(stds[-1]["value"] ** 2 * widths(model, index).read * reading.variance, correlation)
            values = values or own
            out_correlation = averaged.correlation(own.variance)
        else:
            stds.append(_feedforward_stds(model, reading, index, shared))
            out_correlation = model.axes.activation.correlation(reading.correlation)
        variance, correlation = _write(model, variance, correlation, (1 - model.dropout) * out_correlation, index)
    return tuple(stds)


def _start(model: Model, literal: bool) -> tuple[float, float]:
    """Variance and correlation of the stream after the embeddings and their dropout."""
    if literal:
        collision = LITERAL_CORRELATION
    else:
        assert model.vocab_size is not None
        tables = 2 if model.axes.position.adds_table else 1
        collision = float(token_collision(model.vocab_size)) / tables
    return 1.0, (1 - model.dropout) * collision


def _read_variance(model: Model, variance: float, index: int) -> float:
    placement = model.axes.placement.at(model, index)
    if not placement.before_body:
        return variance
    return model.axes.norm.variance(model, variance, index % 2 == 0) * placement.input_scale(index // 2) ** 2


def _attention(model: Model, reading: Reading, values: Reading | None, literal: bool) -> Averaged:
    """What attention keeps of values of the correlation that it reads; `values`: the first layer's, in later layers."""
    own, shared = 0.0, 0.0
    if not literal:
        width = d_head(model)
        factor = model.axes.shaping.logit_factor(model) ** 2
        keys = 1.0 if model.axes.gains.normalises_keys(model) else model.axes.init.logit_scale(width) ** 2 * width
        logit_variance = factor * keys
        own, shared = model.axes.position.mean_weights(model, (1 - reading.correlation) * logit_variance)
        own /= 1 - model.dropout
    share = model.axes.value_mixing.share
    kept, common = _passed(model, reading, reading.correlation, (own, shared), literal)
    if values is None or share is None:
        return Averaged((kept, common))
    # Independent maps, so the variances add; each of values with a correlation of its own, under the same weights.
    by_own, by_first = (1 - share) ** 2, share**2 * values.variance
    kept_first, common_first = _passed(model, reading, values.correlation, (own, shared), literal)
    return Averaged((by_own * kept, by_own * common), (by_first * kept_first, by_first * common_first))


def _passed(
    model: Model, reading: Reading, correlation: float, weights: tuple[float, float], literal: bool
) -> tuple[float, float]:
    """(variance, covariance of two tokens) of the heads' output per unit of the variance of values of that
    correlation.

    `weights`: sums of squared attention weights, and of products of two queries'.
    """
    kept, common = (correlation + (1 - correlation) * each for each in weights)
    if literal:
        return kept, common
    kept, common = model.axes.shaping.moments(kept, common, correlation)
    return model.axes.gate.moments(kept, common, model, reading.variance, reading.correlation)


def _attention_stds(model: Model, reading: Reading, averaged: Averaged, index: int, shared: bool) -> dict[str, float]:
    width, target = widths(model, index), 1 - model.dropout
    read = width.read * reading.variance
    fan_in, kept, first = 1 / math.sqrt(read), averaged.own[0], averaged.first[0]
    if model.axes.placement.at(model, index).before_output:
        return {"query": fan_in, "key": fan_in, "value": fan_in, "output": math.sqrt(target / width.attention)}
    if shared:
        # w^2 d (kept read w^2 + first) = target
        root = math.sqrt(first**2 + 4 * kept * read * target / width.attention)
        both = math.sqrt(2 * target / (width.attention * (first + root)))
        return {"query": fan_in, "key": fan_in, "value": both, "output": both}
    output = math.sqrt(target / (width.attention * (kept + first)))
    return {"query": fan_in, "key": fan_in, "value": fan_in, "output": output}


def _feedforward_stds(model: Model, reading: Reading, index: int, shared: bool) -> dict[str, float]:
    width, target, activation = widths(model, index), 1 - model.dropout, model.axes.activation
    assert model.d_ff is not None
    fan_in = 1 / math.sqrt(width.read * reading.variance)
    if model.axes.placement.at(model, index).before_output:
        return {"fc1": fan_in, "gate": fan_in, "fc2": math.sqrt(target / model.d_ff)}
    if shared and activation.scales_evenly:
        function = activation.function()
        both = _shared_std(function, width.read * reading.variance, model.d_ff, target)
        return {"fc1": both, "fc2": both}
    out = math.sqrt(target / (model.d_ff * activation.second_moment(1.0)))
    return {"fc1": fan_in, "gate": fan_in, "fc2": out}


def _shared_std(function: Function, read: float, d_ff: int, target: float) -> float:
    """The w with d_ff w^2 E[act(N(0, read w^2))^2] = target, by bisection: gelu does not scale with its input."""
    low, high = 0.0, 10 / math.sqrt(min(read, d_ff))
    for _ in range(100):
        w = (low + high) / 2
        excess = d_ff * w * w * float(function.second_moment(read * w * w)) - target
        low, high = (low, w) if excess > 0 else (w, high)
    return (low + high) / 2


def _write(model: Model, variance: float, correlation: float, branch: float, index: int) -> tuple[float, float]:
    """The stream after a branch of variance 1 whose tokens have correlation `branch`."""
    stream = model.axes.stream
    skip, share = stream.gains_at_start(model, index)
    share *= model.axes.depth_drop.root_mean_square(model, index)
    if stream.grows:
        width = stream.widths(model, index)
        total = width.read + width.branch
        skip, share = math.sqrt(width.read / total), math.sqrt(width.branch / total)
    after = skip**2 * variance + share**2
    mixed = (skip**2 * variance * correlation + share**2 * branch) / after
    return (1.0 if model.axes.placement.at(model, index).after_write else after), mixed
