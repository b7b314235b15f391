"""What the theory says of a config at initialisation: its sub-layers as gains, propagated over depth (torch-free)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stablelm.config.schema import ModelConfig
from stablelm.methods import espa, scales
from stablelm.methods.alibi import alibi_slopes
from stablelm.methods.placement import make_placement
from stablelm.methods.stds import Role, initial_std
from stablelm.methods.widths import Widths, d_head, d_key_value, rank, stream_width, widths
from stablelm.theory.attention import AttentionBody, Pattern, causal_pattern
from stablelm.theory.kernels import FeedForwardBody, Norm, norm_forward, times_diagonal
from stablelm.theory.moments import token_collision
from stablelm.theory.propagation import End, SublayerTheory, propagate

Array = NDArray[np.float64]
# Token correlation above which a few early tokens carry the gradient, and it scatters by factors.
COLLAPSED = 0.99


@dataclass(frozen=True)
class Prediction:
    """By layer boundary 0 ... n_layers (0: the embedding), each (n_layers + 1,) float64, nan where there is none.

    As `theory.propagation.Trace`; `gradient_norm`: of the mean loss to the whole stream of all its tokens; nan on
    a stream without skips and where tokens have collapsed, where the theory falls short of measurement by factors.
    """

    stream_variance: Array
    token_correlation: Array
    attention_branch_variance: Array
    feedforward_branch_variance: Array
    attention_entropy: Array
    gradient_norm: Array


def predict(
    config: ModelConfig, *, seq_len: int, tokens: int | None = None, collision: float | None = None
) -> Prediction:
    """Signal and gradient of a resolved config in training mode, over sequences of `seq_len` positions.

    `tokens` are averaged by the loss (None: seq_len); `collision` is the probability that two positions of a
    sequence hold the same token (None: of Zipf's law with this vocabulary).
    """
    assert config.vocab_size is not None
    if collision is None:
        collision = float(token_collision(config.vocab_size))
    tokens = tokens or seq_len
    sublayers = [_sublayer(config, index, seq_len) for index in range(2 * config.n_layers)]
    trace = propagate(_embedding_kernel(config, seq_len, collision), sublayers, _end(config, tokens, collision))
    features = np.array([stream_width(config, layer) for layer in range(config.n_layers + 1)])
    gradient_norm = np.sqrt(trace.gradient_variance * features * tokens)
    if config.stream == "skipless" or trace.token_correlation.max() > COLLAPSED:
        gradient_norm = np.full_like(gradient_norm, np.nan)
    return Prediction(
        stream_variance=trace.stream_variance,
        token_correlation=trace.token_correlation,
        attention_branch_variance=trace.attention_branch_variance,
        feedforward_branch_variance=trace.feedforward_branch_variance,
        attention_entropy=trace.attention_entropy,
        gradient_norm=gradient_norm,
    )


def _head_std(config: ModelConfig) -> float:
    return initial_std(Role("embedding" if config.tie_embeddings else "head", None), (1, 1), config)


def _embedding_kernel(config: ModelConfig, seq_len: int, collision: float) -> Array:
    variance = scales.embedding_std(config) ** 2
    token = variance * scales.embedding_scale(config) ** 2
    kernel = np.full((seq_len, seq_len), token * collision)
    np.fill_diagonal(kernel, token + (variance if config.attention.position == "learned" else 0.0))
    if config.embedding_norm:
        kernel = norm_forward(_norm(config), kernel)
    return times_diagonal(kernel, 1 / (1 - config.dropout))


def _sublayer(config: ModelConfig, index: int, seq_len: int) -> SublayerTheory:
    placement, width = make_placement(config), widths(config, index)
    keep, write = scales.skip_and_branch(config)
    by_depth = 1 / math.sqrt(index // 2 + 1) if placement.by_depth else 1.0
    return SublayerTheory(
        body=_feedforward(config, index, width) if index % 2 else _attention(config, index, width, seq_len),
        keep=keep,
        write=0.0 if config.stream == "rezero" else write,
        norm_in=_norm(config, by_depth) if placement.before_body else None,
        norm_branch=_norm(config) if placement.on_branch else None,
        norm_after=_norm(config) if placement.after_write else None,
        dropout=config.dropout,
        concat=(width.read, width.branch) if config.stream == "concat" else None,
    )


def _norm(config: ModelConfig, scale: float = 1.0) -> Norm:
    return Norm(str(config.norm), scale=scale, alpha=config.norm_alpha, eps=config.norm_eps)


def _attention(config: ModelConfig, index: int, width: Widths, seq_len: int) -> AttentionBody:
    into = {kind: _variance(config, kind, index, width.read, out) for kind, out in _heads(config, width).items()}
    output = _variance(config, "output", index, width.attention, width.branch)
    return AttentionBody(
        pattern=_pattern(config, index // 2, seq_len),
        query_gain=width.read * into["query"],
        key_gain=width.read * into["key"],
        value_gain=width.read * into["value"],
        output_gain=width.attention * output,
        query_back=width.attention * into["query"],
        key_back=width.attention * into["key"],
        value_back=width.attention * into["value"],
        output_back=width.branch * output,
        scale=scales.logit_scale(config),
        d_head=d_head(config),
        qk_norm=bool(config.attention.qk_norm),
        logit_cap=config.attention.logit_cap or None,
        inner_norm=_norm(config) if make_placement(config).before_output else None,
        value_mix=0.5 if config.attention.value_residual else None,
        dropout=config.dropout,
    )


def _heads(config: ModelConfig, width: Widths) -> dict[str, int]:
    d_kv = d_key_value(config)
    return {"query": width.attention, "key": d_kv, "value": d_kv}


def _pattern(config: ModelConfig, layer: int, seq_len: int) -> Pattern:
    if config.attention.shaping == "espa":
        bias, rows = espa.bias_and_scale(layer, config.n_layers, seq_len)
        return Pattern(bias[None], row_scale=rows)
    if config.attention.position == "alibi":
        return _alibi_pattern(config.n_heads, seq_len)
    if config.attention.position == "rope":
        return _rotary_pattern(d_head(config), config.attention.rope_base, seq_len)
    return _plain_pattern(seq_len)


# One object for all layers: the theory keeps its tables by identity.
@lru_cache(maxsize=4)
def _plain_pattern(seq_len: int) -> Pattern:
    return causal_pattern(seq_len)


@lru_cache(maxsize=4)
def _rotary_pattern(width: int, base: float, seq_len: int) -> Pattern:
    return causal_pattern(seq_len, rotary=base ** (-np.arange(0, width, 2, dtype=np.float64) / width))


@lru_cache(maxsize=4)
def _alibi_pattern(n_heads: int, seq_len: int) -> Pattern:
    distance = np.subtract.outer(np.arange(seq_len), np.arange(seq_len)).astype(np.float64)
    bias = -np.array(alibi_slopes(n_heads))[:, None, None] * distance
    return Pattern(np.where(distance >= 0, bias, -np.inf))


def _feedforward(config: ModelConfig, index: int, width: Widths) -> FeedForwardBody:
    assert config.d_ff is not None
    first = _variance(config, "fc1", index, width.read, config.d_ff)
    gate = _variance(config, "gate", index, width.read, config.d_ff) if config.activation == "swiglu" else 0.0
    last = _variance(config, "fc2", index, config.d_ff, width.branch)
    tailored = config.activation == "tailored"
    slope = espa.tailored_slope(config.n_layers) if tailored else 0.0
    return FeedForwardBody(
        activation="leaky" if tailored else str(config.activation),
        fc1_gain=width.read * first,
        fc2_gain=config.d_ff * last,
        fc1_back=config.d_ff * first,
        fc2_back=width.branch * last,
        gate_gain=width.read * gate,
        gate_back=config.d_ff * gate,
        inner_norm=_norm(config) if make_placement(config).before_output else None,
        slope=slope,
        output_scale=math.sqrt(2 / (1 + slope**2)) if tailored else 1.0,
    )


def _variance(config: ModelConfig, kind: str, index: int, d_in: int, d_out: int) -> float:
    """Variance of the entries of a map as it acts at the start: of low-rank factors, of gamma / sigma W."""
    if kind == "query" and config.init == "orthogonal":
        return 0.0
    layer, inner = index // 2, rank(config) if kind in ("query", "key", "value") else None
    sigma = config.reparam == "sigma" and (config.sigma.targets == "all" or index % 2 == 0)
    unit = sigma and config.sigma.gamma == "one"
    if inner is None:
        return _entry(config, Role(kind, layer), (d_out, d_in), unit)
    down = _entry(config, Role(kind, layer, "down"), (inner, d_in), unit)
    return down * _entry(config, Role(kind, layer, "up"), (d_out, inner), unit) * inner


def _entry(config: ModelConfig, role: Role, shape: tuple[int, int], unit: bool) -> float:
    """std^2, or what is left of it when the spectral norm, std (sqrt(d_out) + sqrt(d_in)), is divided out."""
    if unit:
        return (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** -2
    return initial_std(role, shape, config) ** 2


def _end(config: ModelConfig, tokens: int, collision: float) -> End:
    gradient = (_head_std(config) * scales.head_scale(config)) ** 2
    if config.stream == "concat":
        # The projection's entries have variance 1 / fan_in, and d_model of them meet each feature of the stream.
        gradient *= config.d_model / stream_width(config, config.n_layers)
    final = _norm(config) if make_placement(config).final else None
    # Probabilities are close to uniform at the start: sum_v (p_v - y_v)^2 is 1 but for terms of 1 / vocabulary.
    return End(norm=final, head_gradient=gradient, target_collision=collision, tokens=tokens)
