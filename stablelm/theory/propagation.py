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

from stablelm.theory.attention import (
    AttentionBody,
    AttentionState,
    attention_backward,
    attention_forward,
    branch_spread,
)
from stablelm.theory.gates import GateState, GateTheory, gate_backward, gate_forward
from stablelm.theory.kernels import (
    FeedForwardBody,
    FeedForwardState,
    NormTheory,
    feedforward_backward,
    feedforward_forward,
    norm_backward,
    norm_forward,
    norm_slopes,
    times_diagonal,
)
from stablelm.theory.repeats import Repeats, correlation_of, pair, token_correlation
from stablelm.theory.sizes import feedforward_of_unequal, sum_of_unequal

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SublayerTheory:
    """A body, its norms and its way onto the stream: norm_after(keep x + write dropout(norm_branch(body(norm_in(x))))).

    `dropout`: probability on the branch, 0 for evaluation. `concat`: (width, growth), instead of the sum the branch's
    `growth` features are set beside the stream's `width` ones; keep and write are then not used. `gate`: in place of
    the sum. `parallel`: the body reads what the sub-layer before it read. `features`: of the stream, for what a finite
    width adds.
    """

    body: AttentionBody | FeedForwardBody
    keep: float = 1.0
    write: float = 1.0
    norm_in: NormTheory | None = None
    norm_branch: NormTheory | None = None
    norm_after: NormTheory | None = None
    dropout: float = 0.0
    concat: tuple[int, int] | None = None
    gate: GateTheory | None = None
    parallel: bool = False
    features: float = math.inf


@dataclass(frozen=True)
class End:
    """What follows the last sub-layer: a norm and the loss, the mean over `tokens` of their cross-entropies.

    `head_gradient`: E|g|^2 / width for g = gradient of one token's cross-entropy to the head's input, that is
    (multiplier * std of the head)^2 * sum_v E[(p_v - y_v)^2]; `target_collision`: probability that the targets of
    two positions are equal, which is the correlation of their gradients as long as p is close to uniform. `dual`: the
    head reads x + norm(d), d being the embedding and every branch, summed (Xie et al. 2023).
    """

    norm: NormTheory | None
    head_gradient: float
    target_collision: float
    tokens: int
    dual: bool = False


@dataclass(frozen=True)
class Trace:
    """Predictions by layer boundary 0 .. N, each (N + 1,): 0 is the embedding, l the state after layer l.

    `stream_variance`: mean over positions of E[x^2]; `token_correlation`: mean over pairs of positions of
    K_ab / sqrt(K_aa K_bb); `attention_branch_variance`, `feedforward_branch_variance`: of what is written, after
    norm and dropout and before `write`; `attention_branch_spread`: relative standard deviation of the former between
    draws of the weights; `attention_entropy`: mean over rows and heads, in nats; `gradient_variance`:
    mean over positions of E[(dL/dx)^2]. What layers alone have is nan at index 0. `kernel`: (T, T), of the stream
    before the end's norm; `gradient_kernel`: (T, T), at the embedding.
    """

    stream_variance: Array
    token_correlation: Array
    attention_branch_variance: Array
    attention_branch_spread: Array
    feedforward_branch_variance: Array
    attention_entropy: Array
    gradient_variance: Array
    kernel: Array
    gradient_kernel: Array


@dataclass(frozen=True)
class Text:
    """Positions with the same token: their `share` of all pairs, and the kernel, (2, 2), of two of them in the stream
    after the embedding."""

    share: float
    pair: Array


class _First(NamedTuple):
    """Of the first attention body's values: the kernel, and the correlation of two positions with the same token."""

    values: Array
    repeated: float


class _Stream(NamedTuple):
    """The stream's kernel, the text in it, and how unequal its tokens are (`theory.sizes`)."""

    kernel: Array
    text: Text | None
    unequal: float


class _Step(NamedTuple):
    """A sub-layer's forward pass: the stream before it, that which it reads, the kernel before `norm_after`, and the
    stream after it; the branch before `norm_branch`, before dropout and as written; the body's and the gate's state;
    the entropy and the branch's spread, nan for feed-forward."""

    before: _Stream
    read: _Stream
    written: Array
    after: _Stream
    output: Array
    normed: Array
    branch: Array
    state: AttentionState | FeedForwardState
    gate: GateState | None
    entropy: float
    spread: float


class _Beside(NamedTuple):
    """The gradient to the sum d beside the stream: its kernel, and E[dL/dx_a . dL/dd_b] / width with the stream's."""

    kernel: Array
    cross: Array


def propagate(
    kernel: Array, sublayers: Sequence[SublayerTheory], end: End, text: Text | None = None, unequal: float = 0.0
) -> Trace:
    """Carries a kernel up through `sublayers`, attention and feed-forward in turn, and the loss gradient down again.

    `kernel`: (T, T), of the stream after the embedding, at every position at least one other one, the mean over
    whatever tokens these hold; `text`: which of them hold the same, None: none does; `unequal`: relative variance of
    tokens' mean squares in it. Memory grows with the square root of the depth: the backward pass recomputes a run of
    sub-layers from a kept kernel.
    """
    assert len(sublayers) % 2 == 0, "a layer is an attention and a feed-forward sub-layer"
    run = max(2, math.isqrt(len(sublayers)) // 2 * 2)  # whole layers
    stream, first, summed, step, spread = _Stream(kernel, text, unequal), None, kernel, None, 0.0
    kept, records = [], [_record(kernel)]
    for i, sublayer in enumerate(sublayers):
        if i % run == 0:
            kept.append(stream)
        step = _forward(sublayer, stream, first, step)
        if first is None and isinstance(step.state, AttentionState):
            first = _first_of(sublayer, step)
        spread = _spread(sublayer, step, spread)
        if isinstance(sublayer.body, AttentionBody):
            step = step._replace(spread=spread)
        stream, summed = step.after, summed + step.branch
        records.append(_record(stream.kernel, step))
    gradients, gradient_kernel = _gradients(kept, run, sublayers, first, _start(stream.kernel, summed, end))
    attention, feedforward = records[1::2], records[2::2]
    layers = [records[0], *feedforward]
    return Trace(
        stream_variance=np.array([r.variance for r in layers]),
        token_correlation=np.array([r.correlation for r in layers]),
        attention_branch_variance=np.array([np.nan, *(r.branch for r in attention)]),
        attention_branch_spread=np.array([np.nan, *(r.spread for r in attention)]),
        feedforward_branch_variance=np.array([np.nan, *(r.branch for r in feedforward)]),
        attention_entropy=np.array([np.nan, *(r.entropy for r in attention)]),
        gradient_variance=gradients,
        kernel=stream.kernel,
        gradient_kernel=gradient_kernel,
    )


def _spread(sublayer: SublayerTheory, step: _Step, below: float) -> float:
    """Of the branch, given that of the branch below: where nothing but branches is kept, a layer starts at the size
    that the layer below drew, and the relative variances of independent draws add up."""
    handed = below if sublayer.keep == 0 and sublayer.gate is None and sublayer.concat is None else 0.0
    if sublayer.norm_in is not None or sublayer.norm_branch is not None:
        handed = 0.0
    return math.hypot(handed, 0.0 if math.isnan(step.spread) else step.spread)


class _Record(NamedTuple):
    variance: float
    correlation: float
    branch: float
    entropy: float
    spread: float


def _record(kernel: Array, step: _Step | None = None) -> _Record:
    branch, entropy = (math.nan, math.nan) if step is None else (np.diagonal(step.branch).mean(), step.entropy)
    spread = math.nan if step is None else step.spread
    return _Record(float(np.diagonal(kernel).mean()), token_correlation(kernel), float(branch), entropy, spread)


def _start(kernel: Array, summed: Array, end: End) -> tuple[Array, _Beside | None]:
    """Gradient kernel of the loss at the stream's end, and that to the sum beside it."""
    per_token = end.head_gradient / end.tokens**2
    at_head = per_token * (end.target_collision + (1 - end.target_collision) * np.eye(len(kernel)))
    if not end.dual:
        return norm_backward(end.norm, kernel, at_head), None
    cross = at_head * norm_slopes(end.norm, summed)[None, :]
    return at_head, _Beside(norm_backward(end.norm, summed, at_head), cross)


def _gradients(
    kept: list[_Stream],
    run: int,
    sublayers: Sequence[SublayerTheory],
    first: _First | None,
    start: tuple[Array, _Beside | None],
) -> tuple[Array, Array]:
    """Mean gradient variance at each layer boundary, and the gradient kernel at the embedding."""
    gradient, beside = start
    variances, to_first, waiting = [float(np.diagonal(gradient).mean())], None, 0.0
    owner = next((i for i, s in enumerate(sublayers) if isinstance(s.body, AttentionBody)), None)
    for block in reversed(range(len(kept))):
        stream, steps = kept[block], []
        step = None
        for i in range(block * run, min((block + 1) * run, len(sublayers))):
            step = _forward(sublayers[i], stream, None if i == owner else first, step)
            steps.append((i, step))
            stream = step.after
        for i, step in reversed(steps):
            gradient, own, to_values, beside = _backward(
                sublayers[i], step, gradient, to_first if i == owner else None, beside
            )
            # What a parallel body reads stands before the sub-layer below it.
            gradient, waiting = (gradient, own) if sublayers[i].parallel else (gradient + own + waiting, 0.0)
            if to_values is not None:
                to_first = to_values if to_first is None else to_first + to_values
            if i % 2 == 0:
                variances.append(float(np.diagonal(gradient).mean()))
    if beside is not None:
        gradient = gradient + beside.kernel + beside.cross + beside.cross.T
    return np.array(variances[::-1]), gradient


def _first_of(sublayer: SublayerTheory, step: _Step) -> _First:
    assert isinstance(step.state, AttentionState)
    text = step.before.text
    repeated = 0.0 if text is None else correlation_of(norm_forward(sublayer.norm_in, text.pair))
    return _First(step.state.values, repeated)


def _forward(sublayer: SublayerTheory, before: _Stream, first: _First | None, below: _Step | None) -> _Step:
    """`below`: the sub-layer before this one, for one that is parallel to it."""
    body, entropy, spread, read, output_pair = sublayer.body, math.nan, math.nan, before, None
    if sublayer.parallel:
        assert below is not None
        read = below.before
    inside = norm_forward(sublayer.norm_in, read.kernel)
    inside_pair = None if read.text is None else norm_forward(sublayer.norm_in, read.text.pair)
    unequal = read.unequal if sublayer.norm_in is None else 0.0
    if isinstance(body, AttentionBody):
        repeats = None
        if read.text is not None and inside_pair is not None:
            own = correlation_of(inside_pair)
            repeats = Repeats(read.text.share, own, own if first is None else first.repeated)
        output, entropy, state = attention_forward(body, inside, None if first is None else first.values, repeats)
        spread = 0.0 if sublayer.norm_branch is not None else branch_spread(body, state)
        output_pair = None if repeats is None else pair(np.diagonal(output).mean(), state.repeated)
        unequal = unequal if body.centred else 0.0  # but for a token's own value it is an average over tokens
    else:
        output, state = feedforward_forward(body, inside)
        larger, unequal = feedforward_of_unequal(body, float(np.diagonal(inside).mean()), unequal)
        output = times_diagonal(output, larger)
        output_pair = None if inside_pair is None else larger * feedforward_forward(body, inside_pair)[0]
    normed, branch, written, gate = _written(sublayer, before.kernel, output)
    text, after = None, norm_forward(sublayer.norm_after, written)
    if before.text is not None and output_pair is not None:
        pair_written = _written(sublayer, before.text.pair, output_pair)[2]
        text = Text(before.text.share, norm_forward(sublayer.norm_after, pair_written))
    left = _Stream(after, text, _unequal_after(sublayer, before, branch, unequal))
    return _Step(before, read, written, left, output, normed, branch, state, gate, entropy, spread)


def _unequal_after(sublayer: SublayerTheory, before: _Stream, branch: Array, of_branch: float) -> float:
    """How unequal tokens are after the sub-layer, 0 where that is not followed; `of_branch`: in the body's output."""
    if sublayer.norm_after is not None or sublayer.gate is not None or sublayer.concat is not None:
        return 0.0
    body, draws = sublayer.body, 2 / sublayer.features
    if isinstance(body, AttentionBody):
        draws = body.draw_variance
    if sublayer.norm_branch is not None:
        of_branch, draws = 0.0, 0.0
    kept, written = (float(np.diagonal(kernel).mean()) for kernel in (before.kernel, branch))
    kept, written = sublayer.keep**2 * kept, sublayer.write**2 * written
    if not 0 < kept + written < math.inf:
        return 0.0
    return sum_of_unequal(written / (kept + written), before.unequal, of_branch, draws, sublayer.features)


def _written(sublayer: SublayerTheory, before: Array, output: Array) -> tuple[Array, Array, Array, GateState | None]:
    """The branch before its dropout and as written, the stream with it, and the gate's state."""
    normed = norm_forward(sublayer.norm_branch, output)
    branch = times_diagonal(normed, 1 / (1 - sublayer.dropout))
    if sublayer.gate is not None:
        written, state = gate_forward(sublayer.gate, before, normed, sublayer.dropout)
        return normed, branch, written, state
    if sublayer.concat is None:
        return normed, branch, sublayer.keep**2 * before + sublayer.write**2 * branch, None
    width, growth = sublayer.concat
    return normed, branch, (width * before + growth * branch) / (width + growth), None


def _backward(
    sublayer: SublayerTheory, step: _Step, gradient: Array, later: Array | None, beside: _Beside | None
) -> tuple[Array, Array, Array | None, _Beside | None]:
    """Gradient kernels at the stream before the sub-layer by way of its skip, at what it reads by way of its body, at
    the first attention body's values, and beside the stream.

    Beside a concatenated branch the stream's features keep their gradients, and the branch's have the same kernel. A
    branch that is also added to a sum beside the stream gets that sum's gradient too, which has a part in common with
    the stream's: what passed no branch.
    """
    gradient = norm_backward(sublayer.norm_after, step.written, gradient)
    if sublayer.gate is not None:
        assert step.gate is not None and beside is None
        stream, dropout = step.before.kernel, sublayer.dropout
        kept, inner = gate_backward(sublayer.gate, step.gate, stream, step.normed, gradient, dropout)
    else:
        keep, write = (sublayer.keep, sublayer.write) if sublayer.concat is None else (1.0, 1.0)
        kept, inner = keep**2 * gradient, write**2 * gradient
        if beside is not None:
            cross = beside.cross * norm_slopes(sublayer.norm_after, step.written)[:, None]
            inner = inner + beside.kernel + write * (cross + cross.T)
            beside = _Beside(beside.kernel, keep * cross)
        inner = times_diagonal(inner, 1 / (1 - sublayer.dropout))
    inner, to_values = norm_backward(sublayer.norm_branch, step.output, inner), None
    if isinstance(sublayer.body, AttentionBody):
        assert isinstance(step.state, AttentionState)
        inner, to_values = attention_backward(sublayer.body, step.state, inner, later)
    else:
        assert isinstance(step.state, FeedForwardState)
        inner = feedforward_backward(sublayer.body, step.state, inner)
    return kept, norm_backward(sublayer.norm_in, step.read.kernel, inner), to_values, beside
