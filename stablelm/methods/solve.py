"""Weights whose branches have unit variance: the inits `deepscale` and `unit`, solved from the moments.

A recursion over the sub-layers in float64 follows variance and token correlation of the stream, given that every
branch has variance 1 after dropout, and asks for the stds that make it so.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stablelm.config.schema import ModelConfig
from stablelm.methods.alibi import alibi_slopes
from stablelm.methods.placement import make_placement
from stablelm.methods.scales import logit_scale, skip_and_branch
from stablelm.methods.widths import d_head, widths
from stablelm.theory import moments

# Kedia et al. 2024, released code: BERT's embeddings with segments.
LITERAL_CORRELATION = 0.221
LONGEST_KERNEL = 512


@dataclass(frozen=True)
class Reading:
    """What a sub-layer reads, after its norm: variance per feature, correlation of two tokens."""

    variance: float
    correlation: float


@lru_cache(maxsize=32)
def solve(config: ModelConfig) -> tuple[dict[str, float], ...]:
    """Stds of each sub-layer's matrices by role kind, in order of depth; `config` is resolved.

    deepscale (Kedia et al. 2024, section 4 and released code): value and output share one std, fc1 and fc2
    another, query and key have 1 / sqrt(fan_in); unit (ours): all have 1 / sqrt(fan_in) but the last matrix of a
    branch, which is solved. A form `literal` keeps the encoder's recursion: attention gives the tokens' common part
    alone. A form `causal` (ours) counts the positions that have few keys: `moments.effective_correlation`.
    """
    variance, correlation = _start(config)
    stds = []
    for index in range(2 * config.n_layers):
        reading = Reading(_read_variance(config, variance, index), correlation)
        if index % 2 == 0:
            kept, common = _attention(config, reading, index)
            stds.append(_attention_stds(config, reading, kept, index))
            out_correlation = common / kept
        else:
            stds.append(_feedforward_stds(config, reading, index))
            out_correlation = _activation_correlation(config, reading)
        variance, correlation = _write(config, variance, correlation, (1 - config.dropout) * out_correlation, index)
    return tuple(stds)


def _start(config: ModelConfig) -> tuple[float, float]:
    """Variance and correlation of the stream after the embeddings and their dropout."""
    if config.deepscale.form == "literal" and config.init == "deepscale":
        collision = LITERAL_CORRELATION
    else:
        assert config.vocab_size is not None
        tables = 2 if config.attention.position == "learned" else 1
        collision = float(moments.token_collision(config.vocab_size)) / tables
    return 1.0, (1 - config.dropout) * collision


def _read_variance(config: ModelConfig, variance: float, index: int) -> float:
    placement = make_placement(config)
    if not placement.before_body:
        return variance
    if config.norm == "dyt":
        variance = float(moments.dyt_second_moment(config.norm_alpha, variance))
    else:
        variance = 1.0
    return variance / (index // 2 + 1) if placement.by_depth else variance


def _attention(config: ModelConfig, reading: Reading, index: int) -> tuple[float, float]:
    """(variance, covariance of two tokens) of averaged values, per unit of the values' variance."""
    r = reading.correlation
    if config.deepscale.form == "literal" and config.init == "deepscale":
        return r, r
    logit_variance = 1.0 if config.attention.qk_norm else (logit_scale(config) ** 2 * d_head(config))
    q = (1 - r) * logit_variance
    own, shared = _mean_weights(config, q)
    own /= 1 - config.dropout
    kept, common = r + (1 - r) * own, r + (1 - r) * shared
    if config.attention.value_residual and index:
        # Half the first layer's values, half the own: of independent weights, so the variances add.
        return 0.5 * kept, 0.5 * common
    return kept, common


def _mean_weights(config: ModelConfig, q: float) -> tuple[float, float]:
    """Sum of squared attention weights, and of products of two queries' weights, averaged over positions."""
    assert config.max_seq_len is not None
    if config.attention.position != "alibi":
        own, shared = moments.causal_means(config.max_seq_len, q)
        return float(own), float(shared)
    both = [
        _decaying_weights(slope, min(config.max_seq_len, LONGEST_KERNEL), q) for slope in alibi_slopes(config.n_heads)
    ]
    own, shared = (sum(values) / len(both) for values in zip(*both, strict=True))
    return own, shared


def _decaying_weights(slope: float, seq_len: int, q: float) -> tuple[float, float]:
    """As `_mean_weights` for weights exp(-slope distance); the annealed spread of iid Gaussian logits on top."""
    distance = np.subtract.outer(np.arange(seq_len), np.arange(seq_len))
    weights = np.where(distance >= 0, np.exp(-slope * np.abs(distance)), 0.0)
    first, second = weights.sum(axis=1), (weights**2).sum(axis=1)
    own = math.exp(q) * second / (first**2 + math.expm1(q) * second)
    mean = weights / first[:, None]
    overlap = mean @ mean.T
    below = np.tril_indices(seq_len, -1)
    return float(own.mean()), float(overlap[below].mean()) if seq_len > 1 else 1.0


def _attention_stds(config: ModelConfig, reading: Reading, kept: float, index: int) -> dict[str, float]:
    width, target = widths(config, index), 1 - config.dropout
    fan_in = 1 / math.sqrt(width.read * reading.variance)
    if make_placement(config).before_output:
        return {"query": fan_in, "key": fan_in, "value": fan_in, "output": math.sqrt(target / width.attention)}
    if config.init == "deepscale":
        both = (target / (width.read * width.attention * reading.variance * kept)) ** 0.25
        return {"query": fan_in, "key": fan_in, "value": both, "output": both}
    return {"query": fan_in, "key": fan_in, "value": fan_in, "output": math.sqrt(target / (width.attention * kept))}


def _feedforward_stds(config: ModelConfig, reading: Reading, index: int) -> dict[str, float]:
    width, target = widths(config, index), 1 - config.dropout
    assert config.d_ff is not None
    fan_in = 1 / math.sqrt(width.read * reading.variance)
    if make_placement(config).before_output:
        return {"fc1": fan_in, "gate": fan_in, "fc2": math.sqrt(target / config.d_ff)}
    if config.init == "deepscale" and config.activation in ("relu", "gelu"):
        both = _shared_std(config.activation, width.read * reading.variance, config.d_ff, target)
        return {"fc1": both, "fc2": both}
    out = math.sqrt(target / (config.d_ff * second_moment(config, 1.0)))
    return {"fc1": fan_in, "gate": fan_in, "fc2": out}


def second_moment(config: ModelConfig, variance: float) -> float:
    """E[act(x)^2] of the config's activation, whose inputs have that variance."""
    if config.activation == "tailored":
        return variance  # scaled to keep the second moment
    return float(moments.second_moment(str(config.activation), variance))


def _shared_std(activation: str, read: float, d_ff: int, target: float) -> float:
    """The w with d_ff w^2 E[act(N(0, read w^2))^2] = target, by bisection: gelu does not scale with its input."""
    low, high = 0.0, 10 / math.sqrt(min(read, d_ff))
    for _ in range(100):
        w = (low + high) / 2
        excess = d_ff * w * w * float(moments.second_moment(activation, read * w * w)) - target
        low, high = (low, w) if excess > 0 else (w, high)
    return (low + high) / 2


def _activation_correlation(config: ModelConfig, reading: Reading) -> float:
    """Correlation of two tokens after the activation, as the next matrix sees it."""
    r = reading.correlation
    if config.activation == "relu":
        return float(moments.relu_correlation(r))
    if config.activation == "tailored":
        return r  # a leaky relu of a slope near 1 turns it by less than the recursion resolves
    if config.activation == "swiglu":
        return float(moments.swiglu_dual(1.0, r, 1.0)) / float(moments.swiglu_dual(1.0, 1.0, 1.0))
    return float(moments.dual("gelu", 1.0, r, 1.0)) / float(moments.dual("gelu", 1.0, 1.0, 1.0))


def _write(config: ModelConfig, variance: float, correlation: float, branch: float, index: int) -> tuple[float, float]:
    """The stream after a branch of variance 1 whose tokens have correlation `branch`."""
    skip, share = skip_and_branch(config)
    if config.stream == "concat":
        width = widths(config, index)
        total = width.read + width.branch
        skip, share = math.sqrt(width.read / total), math.sqrt(width.branch / total)
    if config.stream == "rezero":
        share = 0.0
    after = skip**2 * variance + share**2
    mixed = (skip**2 * variance * correlation + share**2 * branch) / after
    return (1.0 if make_placement(config).after_write else after), mixed
