"""Signal and gradient over depth at initialisation: token kernels composed sub-layer by sub-layer.

See `theory.kernels` for what a kernel is. A branch is uncorrelated with the stream it is written onto, forward and
backward, because its last matrix and its first are drawn independently of all else; so kernels add
(Schoenholz et al. 2017; for transformers Kedia et al. 2024, section 3, whose scalar recursions this refines to whole
kernels, with positions).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.attention import AttentionBody, AttentionState, attention_backward, attention_forward
from stablelm.theory.kernels import (
    FeedForwardBody,
    FeedForwardState,
    NormTheory,
    feedforward_backward,
    feedforward_forward,
    norm_backward,
    norm_forward,
    times_diagonal,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SublayerTheory:
    """A body, its norms and its way onto the stream: norm_after(keep x + write dropout(norm_branch(body(norm_in(x))))).

    `dropout`: probability on the branch, 0 for evaluation. `concat`: (width, growth), instead of the sum the branch's
    `growth` features are set beside the stream's `width` ones; keep and write are then not used. `parallel`: the body
    reads what the sub-layer before it read.
    """

    body: AttentionBody | FeedForwardBody
    keep: float = 1.0
    write: float = 1.0
    norm_in: NormTheory | None = None
    norm_branch: NormTheory | None = None
    norm_after: NormTheory | None = None
    dropout: float = 0.0
    concat: tuple[int, int] | None = None
    parallel: bool = False


@dataclass(frozen=True)
class End:
    """What follows the last sub-layer: a norm and the loss, the mean over `tokens` of their cross-entropies.

    `head_gradient`: E|g|^2 / width for g = gradient of one token's cross-entropy to the head's input, that is
    (multiplier * std of the head)^2 * sum_v E[(p_v - y_v)^2]; `target_collision`: probability that the targets of
    two positions are equal, which is the correlation of their gradients as long as p is close to uniform.
    """

    norm: NormTheory | None
    head_gradient: float
    target_collision: float
    tokens: int


@dataclass(frozen=True)
class Trace:
    """Predictions by layer boundary 0 .. N, each (N + 1,): 0 is the embedding, l the state after layer l.

    `stream_variance`: mean over positions of E[x^2]; `token_correlation`: mean over pairs of positions of
    K_ab / sqrt(K_aa K_bb); `attention_branch_variance`, `feedforward_branch_variance`: of what is written, after
    norm and dropout and before `write`; `attention_entropy`: mean over rows and heads, in nats; `gradient_variance`:
    mean over positions of E[(dL/dx)^2]. What layers alone have is nan at index 0. `kernel`: (T, T), of the stream
    before the end's norm; `gradient_kernel`: (T, T), at the embedding.
    """

    stream_variance: Array
    token_correlation: Array
    attention_branch_variance: Array
    feedforward_branch_variance: Array
    attention_entropy: Array
    gradient_variance: Array
    kernel: Array
    gradient_kernel: Array


class _Step(NamedTuple):
    """A sub-layer's forward pass: the stream before it, what it reads of it, and the stream after it, also before
    `norm_after`; the branch before `norm_branch` and as written; the body's state; its entropy, nan for feed-forward.
    """

    before: Array
    read: Array
    written: Array
    after: Array
    output: Array
    branch: Array
    state: AttentionState | FeedForwardState
    entropy: float


def token_correlation(kernel: Array) -> float:
    """Mean over pairs of positions of K_ab / sqrt(K_aa K_bb); `kernel`: (T, T) with T > 1."""
    std = np.sqrt(np.diagonal(kernel))
    size = len(kernel)
    return float(((kernel / np.outer(std, std)).sum() - size) / (size * (size - 1)))


def propagate(kernel: Array, sublayers: Sequence[SublayerTheory], end: End) -> Trace:
    """Carries a kernel up through `sublayers`, attention and feed-forward in turn, and the loss gradient down again.

    `kernel`: (T, T), of the stream after the embedding, at every position at least one other one. Memory grows with
    the square root of the depth: the backward pass recomputes a run of sub-layers from a kept kernel.
    """
    assert len(sublayers) % 2 == 0, "a layer is an attention and a feed-forward sub-layer"
    run = max(2, math.isqrt(len(sublayers)) // 2 * 2)  # whole layers
    kept, records, first, step = [], [_record(kernel)], None, None
    for i, sublayer in enumerate(sublayers):
        if i % run == 0:
            kept.append(kernel)
        step = _forward(sublayer, kernel, first, step)
        if first is None and isinstance(step.state, AttentionState):
            first = step.state.values
        kernel = step.after
        records.append(_record(kernel, step))
    gradients, gradient_kernel = _gradients(kept, run, sublayers, first, _start(kernel, end))
    attention, feedforward = records[1::2], records[2::2]
    layers = [records[0], *feedforward]
    return Trace(
        stream_variance=np.array([r.variance for r in layers]),
        token_correlation=np.array([r.correlation for r in layers]),
        attention_branch_variance=np.array([np.nan, *(r.branch for r in attention)]),
        feedforward_branch_variance=np.array([np.nan, *(r.branch for r in feedforward)]),
        attention_entropy=np.array([np.nan, *(r.entropy for r in attention)]),
        gradient_variance=gradients,
        kernel=kernel,
        gradient_kernel=gradient_kernel,
    )


class _Record(NamedTuple):
    variance: float
    correlation: float
    branch: float
    entropy: float


def _record(kernel: Array, step: _Step | None = None) -> _Record:
    branch, entropy = (math.nan, math.nan) if step is None else (np.diagonal(step.branch).mean(), step.entropy)
    return _Record(float(np.diagonal(kernel).mean()), token_correlation(kernel), float(branch), entropy)


def _start(kernel: Array, end: End) -> Array:
    """Gradient kernel of the loss at the stream's end."""
    per_token = end.head_gradient / end.tokens**2
    at_head = per_token * (end.target_collision + (1 - end.target_collision) * np.eye(len(kernel)))
    return norm_backward(end.norm, kernel, at_head)


def _gradients(
    kept: list[Array], run: int, sublayers: Sequence[SublayerTheory], first: Array | None, gradient: Array
) -> tuple[Array, Array]:
    """Mean gradient variance at each layer boundary, and the gradient kernel at the embedding."""
    variances, to_first, waiting = [float(np.diagonal(gradient).mean())], None, 0.0
    owner = next((i for i, s in enumerate(sublayers) if isinstance(s.body, AttentionBody)), None)
    for block in reversed(range(len(kept))):
        kernel, steps = kept[block], []
        step = None
        for i in range(block * run, min((block + 1) * run, len(sublayers))):
            step = _forward(sublayers[i], kernel, None if i == owner else first, step)
            steps.append((i, step))
            kernel = step.after
        for i, step in reversed(steps):
            gradient, own, to_values = _backward(sublayers[i], step, gradient, to_first if i == owner else None)
            # What a parallel body reads stands before the sub-layer below it.
            gradient, waiting = (gradient, own) if sublayers[i].parallel else (gradient + own + waiting, 0.0)
            if to_values is not None:
                to_first = to_values if to_first is None else to_first + to_values
            if i % 2 == 0:
                variances.append(float(np.diagonal(gradient).mean()))
    return np.array(variances[::-1]), gradient


def _forward(sublayer: SublayerTheory, before: Array, first: Array | None, below: _Step | None) -> _Step:
    """`below`: the sub-layer before this one, for one that is parallel to it."""
    body, entropy, read = sublayer.body, math.nan, before
    if sublayer.parallel:
        assert below is not None
        read = below.before
    inside = norm_forward(sublayer.norm_in, read)
    if isinstance(body, AttentionBody):
        output, entropy, state = attention_forward(body, inside, first)
    else:
        output, state = feedforward_forward(body, inside)
    branch = times_diagonal(norm_forward(sublayer.norm_branch, output), 1 / (1 - sublayer.dropout))
    if sublayer.concat is None:
        written = sublayer.keep**2 * before + sublayer.write**2 * branch
    else:
        width, growth = sublayer.concat
        written = (width * before + growth * branch) / (width + growth)
    return _Step(before, read, written, norm_forward(sublayer.norm_after, written), output, branch, state, entropy)


def _backward(
    sublayer: SublayerTheory, step: _Step, gradient: Array, later: Array | None
) -> tuple[Array, Array, Array | None]:
    """Gradient kernels at the stream before the sub-layer by way of its skip, at what it reads by way of its body, and
    at the first attention body's values.

    Beside a concatenated branch the stream's features keep their gradients, and the branch's have the same kernel.
    """
    gradient = norm_backward(sublayer.norm_after, step.written, gradient)
    keep, write = (sublayer.keep, sublayer.write) if sublayer.concat is None else (1.0, 1.0)
    inner = times_diagonal(write**2 * gradient, 1 / (1 - sublayer.dropout))
    inner, to_values = norm_backward(sublayer.norm_branch, step.output, inner), None
    if isinstance(sublayer.body, AttentionBody):
        assert isinstance(step.state, AttentionState)
        inner, to_values = attention_backward(sublayer.body, step.state, inner, later)
    else:
        assert isinstance(step.state, FeedForwardState)
        inner = feedforward_backward(sublayer.body, step.state, inner)
    return keep**2 * gradient, norm_backward(sublayer.norm_in, step.read, inner), to_values
