"""What the theory says of a config at initialisation: its sub-layers as gains, propagated over depth (torch-free)."""

from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Role, Widths
from stablelm.methods.sizes import d_head, d_key_value, stream_width, widths
from stablelm.methods.stds import initial_std
from stablelm.theory.attention import AttentionBody, Pattern
from stablelm.theory.kernels import FeedForwardBody, NormTheory, norm_forward, times_diagonal
from stablelm.theory.moments import token_collision
from stablelm.theory.propagation import End, SublayerTheory, Text, propagate
from stablelm.theory.repeats import pair

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
    attention_branch_spread: Array
    feedforward_branch_variance: Array
    attention_entropy: Array
    gradient_norm: Array


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def predict(
    config: ModelConfig, *, seq_len: int, tokens: int | None = None, collision: float | None = None
) -> Prediction:
    """Signal and gradient of a resolved config in training mode, over sequences of `seq_len` positions.

    `tokens` are averaged by the loss (None: seq_len); `collision` is the probability that two positions of a
    sequence hold the same token (None: of Zipf's law with this vocabulary). Figures are not finite from the depth on at
    which a model explodes beyond float64.
    """
    assert config.vocab_size is not None
    if not config.axes.stream.predicted:
        return Prediction(*(np.full(config.n_layers + 1, np.nan) for _ in fields(Prediction)))
    if collision is None:
        collision = float(token_collision(config.vocab_size))
    tokens = tokens or seq_len
    sublayers = [_sublayer(config, index, seq_len) for index in range(2 * config.n_layers)]
    kernel, text = _embedding(config, seq_len, collision)
    trace = propagate(kernel, sublayers, _end(config, tokens, collision), text)
    features = np.array([stream_width(config, layer) for layer in range(config.n_layers + 1)])
    gradient_norm = np.sqrt(trace.gradient_variance * features * tokens)
    if not config.axes.stream.has_skip or trace.token_correlation.max() > COLLAPSED:
        gradient_norm = np.full_like(gradient_norm, np.nan)
    return Prediction(**{each.name: getattr(trace, each.name, gradient_norm) for each in fields(Prediction)})


def _head_std(config: ModelConfig) -> float:
    return initial_std(Role("embedding" if config.tie_embeddings else "head", None), (1, 1), config)


def _embedding(config: ModelConfig, seq_len: int, collision: float) -> tuple[Array, Text]:
    """The stream's kernel at its start, and what positions with the same token share in it."""
    init = config.axes.init
    variance = init.embedding_std(config) ** 2
    token = variance * (init.embedding_scale(config) * (config.axes.norm.embedding_gain(config) or 1.0)) ** 2
    whole = token + (variance if config.axes.position.adds_table else 0.0)
    kernel = np.full((seq_len, seq_len), token * collision)
    np.fill_diagonal(kernel, whole)
    ready = [_embedded(config, each) for each in (kernel, pair(whole, token / whole))]
    return ready[0], Text(collision, ready[1])


def _embedded(config: ModelConfig, kernel: Array) -> Array:
    kernel = times_diagonal(kernel, 1 / (1 - config.dropout))
    return norm_forward(_norm(config), kernel) if config.embedding_norm else kernel


def _sublayer(config: ModelConfig, index: int, seq_len: int) -> SublayerTheory:
    placement, stream = config.axes.placement, config.axes.stream
    width, norm = widths(config, index), partial(_norm, config, attention=index % 2 == 0)
    return SublayerTheory(
        body=_feedforward(config, index, width) if index % 2 else _attention(config, index, width, seq_len),
        keep=stream.gains(config)[0],
        write=stream.branch_at_start(config),
        norm_in=norm(placement.input_scale(index // 2)) if placement.before_body else None,
        norm_branch=norm() if placement.on_branch else None,
        norm_after=norm() if placement.after_write else None,
        dropout=config.dropout,
        concat=(width.read, width.branch) if stream.grows else None,
    )


def _norm(config: ModelConfig, scale: float = 1.0, *, attention: bool = False) -> NormTheory:
    norm = config.axes.norm
    found = norm.theory(config, scale)
    return replace(found, alpha=norm.slope(config, attention)) if norm.has_slope else found


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
        scale=config.axes.init.logit_scale(d_head(config)),
        d_head=d_head(config),
        qk_norm=bool(config.attention.qk_norm),
        logit_cap=config.attention.logit_cap or None,
        inner_norm=_norm(config, attention=True) if config.axes.placement.before_output else None,
        value_mix=config.axes.value_mixing.share,
        dropout=config.dropout,
        draw_variance=2 / width.branch + (0.0 if config.axes.placement.before_output else 2 / d_key_value(config)),
    )


def _heads(config: ModelConfig, width: Widths) -> dict[str, int]:
    d_kv = d_key_value(config)
    return {"query": width.attention, "key": d_kv, "value": d_kv}


def _pattern(config: ModelConfig, layer: int, seq_len: int) -> Pattern:
    if config.axes.shaping.active:
        bias, rows = config.axes.shaping.bias_and_scale(layer, config.n_layers, seq_len)
        return Pattern(bias[None], row_scale=rows)
    return config.axes.position.pattern(config, seq_len, d_head(config))


def _feedforward(config: ModelConfig, index: int, width: Widths) -> FeedForwardBody:
    assert config.d_ff is not None
    activation = config.axes.activation
    first = _variance(config, "fc1", index, width.read, config.d_ff)
    gate = _variance(config, "gate", index, width.read, config.d_ff) if activation.gated else 0.0
    last = _variance(config, "fc2", index, config.d_ff, width.branch)
    return FeedForwardBody(
        function=activation.function(config.n_layers),
        fc1_gain=width.read * first,
        fc2_gain=config.d_ff * last,
        fc1_back=config.d_ff * first,
        fc2_back=width.branch * last,
        gate_gain=width.read * gate,
        gate_back=config.d_ff * gate,
        inner_norm=_norm(config) if config.axes.placement.before_output else None,
        output_scale=activation.output_scale(config.n_layers),
        gated=activation.gated,
    )


def _variance(config: ModelConfig, kind: str, index: int, d_in: int, d_out: int) -> float:
    """Variance of the entries of a map as it acts at the start: of low-rank factors, of a reparametrised matrix."""
    if config.axes.init.starts_at_zero(kind):
        return 0.0
    layer, inner = index // 2, config.axes.maps.rank(config) if kind in ("query", "key", "value") else None
    if inner is None:
        return _entry(config, Role(kind, layer), (d_out, d_in), index)
    down = _entry(config, Role(kind, layer, "down"), (inner, d_in), index)
    return down * _entry(config, Role(kind, layer, "up"), (d_out, inner), index) * inner


def _entry(config: ModelConfig, role: Role, shape: tuple[int, int], index: int) -> float:
    std, reparam = initial_std(role, shape, config), config.axes.reparam
    return reparam.entry_variance(config, std, shape) if reparam.applies(config, index) else std**2


def _end(config: ModelConfig, tokens: int, collision: float) -> End:
    gradient = (_head_std(config) * config.axes.init.head_scale(config)) ** 2
    if config.axes.stream.grows:
        # The projection's entries have variance 1 / fan_in, and d_model of them meet each feature of the stream.
        gradient *= config.d_model / stream_width(config, config.n_layers)
    final = _norm(config) if config.axes.placement.final else None
    # Probabilities are close to uniform at the start: sum_v (p_v - y_v)^2 is 1 but for terms of 1 / vocabulary.
    return End(norm=final, head_gradient=gradient, target_collision=collision, tokens=tokens)
