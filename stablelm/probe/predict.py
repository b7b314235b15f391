"""What the theory says of a config at initialisation: its sub-layers as gains, propagated over depth (torch-free)."""

from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Role, Widths
from stablelm.methods.sizes import d_head, d_key_value, stream_width, widths
from stablelm.methods.stds import entry_variance, initial_std, map_variance
from stablelm.theory.attention import AttentionBody, Pattern
from stablelm.theory.kernels import FeedForwardBody, NormTheory, norm_forward, times_diagonal
from stablelm.theory.moments import causal_means, gate_function, token_collision
from stablelm.theory.propagation import End, SublayerTheory, Text, propagate
from stablelm.theory.repeats import pair

Array = NDArray[np.float64]
# Token correlation above which there is no gradient, and why.
COLLAPSED = 0.99
COLLAPSE = "tokens have collapsed, and a few early ones carry a gradient that scatters by factors"
OVERFLOW = "figures of the theory are too large for float64"


@dataclass(frozen=True)
class Prediction:
    """By layer boundary 0 ... n_layers (0: the embedding), each (n_layers + 1,) float64, nan where there is none.

    As `theory.propagation.Trace`; `gradient_norm`: of the mean loss to the whole stream of all its tokens; nan where
    tokens have collapsed, where the theory falls short of measurement by factors.
    """

    stream_variance: Array
    token_correlation: Array
    attention_branch_variance: Array
    attention_branch_spread: Array
    feedforward_branch_variance: Array
    attention_entropy: Array
    gradient_norm: Array


def theory_gap(config: ModelConfig) -> str | None:
    """The assumption that the theory lacks in a resolved config; None: it knows the model."""
    gaps = (value.theory_gap(config) for value in config.axes.each())
    return next((gap for gap in gaps if gap is not None), None)


def unpredicted(config: ModelConfig, prediction: Prediction) -> dict[str, str]:
    """Why figures are nan or infinite at some layer, by their names in `Prediction`."""
    gap, collapsed = theory_gap(config), prediction.token_correlation.max() > COLLAPSED
    # An embedding has no branches and no attention.
    missing = [name for name, column in vars(prediction).items() if not np.isfinite(column[1:]).all()]
    return {name: gap or (COLLAPSE if collapsed and name == "gradient_norm" else OVERFLOW) for name in missing}


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def predict(
    config: ModelConfig, *, seq_len: int, tokens: int | None = None, collision: float | None = None
) -> Prediction:
    """Signal and gradient of a resolved config in training mode, over sequences of `seq_len` positions.

    Nan where there is a `theory_gap`. `tokens` are averaged by the loss (None: seq_len); `collision` is the probability
    that two positions of a sequence hold the same token (None: of Zipf's law with this vocabulary). Figures are not
    finite from the depth on at which a model explodes beyond float64.
    """
    assert config.vocab_size is not None
    if theory_gap(config) is not None:
        return Prediction(*(np.full(config.n_layers + 1, np.nan) for _ in fields(Prediction)))
    if collision is None:
        collision = float(token_collision(config.vocab_size))
    tokens = tokens or seq_len
    sublayers = [_sublayer(config, index, seq_len) for index in range(2 * config.n_layers)]
    kernel, text = _embedding(config, seq_len, collision)
    unequal = 0.0 if config.embedding_norm else 2 / config.d_model  # of Gaussian entries
    trace = propagate(kernel, sublayers, _end(config, tokens, collision), text, unequal)
    features = np.array([stream_width(config, layer) for layer in range(config.n_layers + 1)])
    gradient_norm = np.sqrt(trace.gradient_variance * features * tokens)
    if trace.token_correlation.max() > COLLAPSED:
        gradient_norm = np.full_like(gradient_norm, np.nan)
    return Prediction(**{each.name: getattr(trace, each.name, gradient_norm) for each in fields(Prediction)})


def predict_sensitivity(config: ModelConfig, prediction: Prediction, seq_len: int) -> tuple[float | None, str | None]:
    """Sensitivity of the stream at the end (`theory.sensitivity`), or why the theory has none.

    A branch counts with its matrices: values and output, the two or, gated, three of the feed-forward, and queries and
    keys by how much they move the attention weights.
    """
    stream, norm = config.axes.stream, config.axes.norm
    if norm.standard is None:
        return (
            None,
            f"the theory needs norms that divide by the size of their input, and model.norm={norm.name} does not",
        )
    branches = (prediction.attention_branch_variance[1:], prediction.feedforward_branch_variance[1:])
    variances = np.stack(branches, axis=1).ravel()
    if not np.isfinite(variances).all():
        nothing = f"the theory has no finite variance of the branches of model.stream={stream.name}"
        return None, theory_gap(config) or nothing
    values = (3 if config.axes.maps.rank(config) else 2) if config.axes.maps.has_values else 0
    feedforward = 3 if config.axes.activation.gated else 2
    logits = [_logit_matrices(config, layer, prediction, seq_len) for layer in range(config.n_layers)]
    matrices = np.array([[values + moved, feedforward] for moved in logits], dtype=np.float64)
    found = stream.sensitivity(config, variances, matrices.ravel(), float(prediction.stream_variance[0]))
    if found is None:
        return None, f"the theory does not know what a branch contributes to model.stream={stream.name}"
    return found, None


def _logit_matrices(config: ModelConfig, layer: int, prediction: Prediction, seq_len: int) -> float:
    """What queries and keys together count beside a matrix of the branch, in attention without biases.

    Changes of relative size p move logits by p sqrt(2) times their spread, and the output by that times the part of its
    variance that tokens do not share (derived here).
    """
    body = _attention(config, 2 * layer, widths(config, 2 * layer), seq_len)
    norm, r = config.axes.placement.before_body, float(np.clip(prediction.token_correlation[layer], 0, 1))
    variance = config.axes.placement.input_scale(layer) ** 2 if norm else float(prediction.stream_variance[layer])
    gain = body.scale**2 * body.d_head * (1.0 if body.qk_norm else body.query_gain * body.key_gain * variance**2)
    spread = gain * (1 - r)
    own = (1 - r) * causal_means(seq_len, spread)[0]
    return 2 * spread * own / (own + r)


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
    stream, placement = config.axes.stream, config.axes.placement.at(config, index)
    width, norm = widths(config, index), partial(_norm, config, attention=index % 2 == 0)
    keep, write = stream.gains_at_start(config, index)
    return SublayerTheory(
        body=_feedforward(config, index, width) if index % 2 else _attention(config, index, width, seq_len),
        keep=keep,
        write=write * config.axes.depth_drop.root_mean_square(config, index),
        parallel=stream.parallel and index % 2 == 1,
        norm_in=norm(placement.input_scale(index // 2)) if placement.before_body else None,
        norm_branch=norm() if placement.on_branch else None,
        norm_after=norm() if placement.after_write else None,
        dropout=config.dropout,
        concat=(width.read, width.branch) if stream.grows else None,
        gate=stream.gate(config),
        features=width.branch,
    )


def _norm(config: ModelConfig, scale: float = 1.0, *, attention: bool = False) -> NormTheory:
    norm = config.axes.norm
    found = norm.theory(config, scale)
    return replace(found, alpha=norm.slope(config, attention)) if norm.has_slope else found


def _attention(config: ModelConfig, index: int, width: Widths, seq_len: int) -> AttentionBody:
    into = {kind: map_variance(config, kind, index, width.read, out) for kind, out in _heads(config, width).items()}
    before_output = config.axes.placement.at(config, index).before_output
    kept = min(d_key_value(config), config.axes.maps.rank(config) or width.read)
    draw_variance = config.axes.init.draw_variance
    draws = draw_variance(width.branch, width.attention) + (0.0 if before_output else draw_variance(kept, width.read))
    axes, output = config.axes, map_variance(config, "output", index, width.attention, width.branch)
    if not axes.maps.has_values:  # the identity in their place: width.read, width.attention and width.branch are equal
        into["value"] = output = 1 / width.attention
        draws = 0.0
    gates = entry_variance(config, Role("head_gate", index // 2), (axes.gate.width(config), width.read), index)
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
        scale=_logit_scale(config),
        d_head=d_head(config),
        qk_norm=config.axes.gains.normalises_keys(config),
        logit_cap=config.attention.logit_cap or None,
        inner_norm=_norm(config, attention=True) if before_output else None,
        value_mix=config.axes.value_mixing.share,
        dropout=config.dropout,
        null_logit=axes.softmax.null_at_start,
        centred=axes.shaping.combines,
        average=axes.shaping.average_at_start,
        gate=gate_function(axes.gate.logit_mean(config)) if axes.gate.width(config) else None,
        gate_gain=width.read * gates,
        gate_back=width.attention * gates,
        draw_variance=draws,
    )


def _logit_scale(config: ModelConfig) -> float:
    """Of queries and keys of length sqrt(d_head) where they are normalised, with learned factors at their start."""
    axes = config.axes
    scale = axes.init.logit_scale(d_head(config)) * axes.shaping.logit_factor(config)
    return scale * axes.gains.logits_at_start(config)


def _heads(config: ModelConfig, width: Widths) -> dict[str, int]:
    d_kv = d_key_value(config)
    return {"query": width.attention, "key": d_kv, "value": d_kv}


def _pattern(config: ModelConfig, layer: int, seq_len: int) -> Pattern:
    if config.axes.shaping.active:
        bias, rows = config.axes.shaping.bias_and_scale(config, layer, seq_len)
        return Pattern(bias[None], row_scale=rows)
    return config.axes.position.pattern(config, seq_len, d_head(config))


def _feedforward(config: ModelConfig, index: int, width: Widths) -> FeedForwardBody:
    assert config.d_ff is not None
    activation = config.axes.activation
    first = map_variance(config, "fc1", index, width.read, config.d_ff)
    gate = map_variance(config, "gate", index, width.read, config.d_ff) if activation.gated else 0.0
    last = map_variance(config, "fc2", index, config.d_ff, width.branch)
    return FeedForwardBody(
        function=activation.function(),
        fc1_gain=width.read * first,
        fc2_gain=config.d_ff * last,
        fc1_back=config.d_ff * first,
        fc2_back=width.branch * last,
        gate_gain=width.read * gate,
        gate_back=config.d_ff * gate,
        inner_norm=_norm(config) if config.axes.placement.at(config, index).before_output else None,
        output_scale=activation.output_scale(),
        gated=activation.gated,
    )


def _end(config: ModelConfig, tokens: int, collision: float) -> End:
    gradient = (_head_std(config) * config.axes.init.head_scale(config) * config.axes.gains.start(config, "head")) ** 2
    if config.axes.stream.grows:
        # The projection's entries have variance 1 / fan_in, and d_model of them meet each feature of the stream.
        gradient *= config.d_model / stream_width(config, config.n_layers)
    final = _norm(config) if config.axes.placement.final else None
    # Probabilities are close to uniform at the start: sum_v (p_v - y_v)^2 is 1 but for terms of 1 / vocabulary.
    return End(
        norm=final, head_gradient=gradient, target_collision=collision, tokens=tokens, dual=config.axes.stream.dual
    )
