"""Kernels composed over depth: whole random stacks, exact growth laws, and the cost of a thousand layers."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_stack import simulate

from stablelm.theory.attention import AttentionBody, Pattern, attention_forward, causal_pattern
from stablelm.theory.kernels import FeedForwardBody, NormTheory
from stablelm.theory.moments import GELU, RELU, SILU, Function, LeakyRelu
from stablelm.theory.propagation import End, SublayerTheory, propagate, token_correlation

SEQ_LEN, D_MODEL, HEADS, VOCAB, BATCH = 64, 256, 4, 4096, 4
D_HEAD, D_FF = D_MODEL // HEADS, 4 * D_MODEL
LAYER_NORM = NormTheory(centred=True)
ROTARY = 10000.0 ** -(np.arange(D_HEAD // 2) * 2 / D_HEAD)
ZIPF = 1 / np.arange(1, VOCAB + 1) / (1 / np.arange(1, VOCAB + 1)).sum()
COLLISION = float((ZIPF**2).sum())


def attention(query=1.0, value=1.0, output=1.0, pattern=None, **keys) -> AttentionBody:
    """Square projections with these gains: forward and backward ones are equal."""
    return AttentionBody(
        pattern=pattern or causal_pattern(SEQ_LEN),
        query_gain=query, key_gain=query, value_gain=value, output_gain=output,
        query_back=query, key_back=query, value_back=value, output_back=output,
        scale=D_HEAD**-0.5, d_head=D_HEAD, **keys,
    )  # fmt: skip


def feedforward(function: Function = RELU, fc1=1.0, fc2=2.0, ratio=D_FF / D_MODEL, **keys) -> FeedForwardBody:
    """`ratio`: hidden over outer width; gains of 1 and 2 keep a relu's second moment."""
    if keys.get("gated"):
        keys |= {"gate_gain": fc1, "gate_back": fc1 * ratio}
    return FeedForwardBody(function, fc1, fc2, fc1 * ratio, fc2 / ratio, **keys)


def stack(n_layers: int, first, second, **keys) -> list[SublayerTheory]:
    return [SublayerTheory(body, **keys) for _ in range(n_layers) for body in (first, second)]


def xavier(**keys) -> tuple[AttentionBody, FeedForwardBody]:
    gain = 2 * D_MODEL / (D_MODEL + D_HEAD)
    return attention(gain, gain, 1.0, **keys), feedforward(fc1=0.4, fc2=1.6)


def start(variance: float = 1.0, seq_len: int = SEQ_LEN) -> np.ndarray:
    return variance * (COLLISION + (1 - COLLISION) * np.eye(seq_len))


def end(norm: NormTheory | None = LAYER_NORM, width: int = D_MODEL) -> End:
    return End(norm, 1 / width, COLLISION, BATCH * SEQ_LEN)


def test_a_sum_beside_the_stream_passes_its_gradient_to_every_branch():
    """Without norms both hold the same: the head reads 2 x, and its gradient is twice that of x alone."""
    sublayers = stack(3, *xavier())
    one, two = (propagate(start(), sublayers, replace(end(None), dual=dual)) for dual in (False, True))
    assert two.stream_variance == pytest.approx(one.stream_variance, rel=1e-12)
    assert two.gradient_kernel == pytest.approx(4 * one.gradient_kernel, rel=1e-12)


def scaled(n_layers: int, function: Function = RELU, **keys) -> list[SublayerTheory]:
    """DeepScaleLM's skip and branch with unit branches: values grow where attention averages them away."""
    beta_squared, sublayers = 2 / n_layers, []
    for layer in range(n_layers):
        r = 0.9 * layer / n_layers
        gain = (r + (1 - r) * 0.15) ** -0.5
        bodies = (
            attention(1.0, gain, gain, **keys),
            feedforward(function, fc2=2.35 if function is GELU else 2.0),
        )
        keep, write = math.sqrt(1 - beta_squared), math.sqrt(beta_squared)
        sublayers += [SublayerTheory(body, keep, write, norm_in=LAYER_NORM) for body in bodies]
    return sublayers


def deepnorm(n_layers: int) -> list[SublayerTheory]:
    alpha, beta = (2 * n_layers) ** 0.25, (8 * n_layers) ** -0.25
    bodies = attention(1.0, beta**2, beta**2), feedforward(fc1=0.4 * beta**2, fc2=1.6 * beta**2)
    return stack(n_layers, *bodies, keep=alpha, norm_after=LAYER_NORM)


def magneto(n_layers: int) -> list[SublayerTheory]:
    gain = math.log(2 * n_layers)
    first = attention(1.0, gain, gain, inner_norm=LAYER_NORM)
    return stack(
        n_layers, first, feedforward(fc1=0.4 * gain, fc2=1.6 * gain, inner_norm=LAYER_NORM), norm_in=LAYER_NORM
    )


def catformer(n_layers: int) -> list[SublayerTheory]:
    growth, sublayers, width = 32, [], D_MODEL
    for i in range(2 * n_layers):
        first = replace(attention(), query_back=D_MODEL / width, key_back=D_MODEL / width, value_back=D_MODEL / width,
                        output_back=growth / D_MODEL)  # fmt: skip
        second = FeedForwardBody(GELU, 1.0, 2.35, D_FF / width, 2.35 * growth / D_FF)
        sublayers.append(SublayerTheory(second if i % 2 else first, norm_in=LAYER_NORM, concat=(width, growth)))
        width += growth
    return sublayers


def alibi() -> Pattern:
    distance = np.subtract.outer(np.arange(float(SEQ_LEN)), np.arange(float(SEQ_LEN)))
    return Pattern(np.where(distance >= 0, -(0.25 ** np.arange(1, 3))[:, None, None] * distance, -np.inf))


RMS = NormTheory()
SWIGLU = feedforward(SILU, fc2=2.8, ratio=3.0, gated=True)
STACKS = {
    "pre": stack(12, *xavier(), norm_in=LAYER_NORM),
    "post": stack(8, *xavier(), norm_after=LAYER_NORM),
    "peri": stack(12, *xavier(), norm_in=LAYER_NORM, norm_branch=LAYER_NORM),
    "dropout": stack(8, attention(dropout=0.1), feedforward(), norm_in=LAYER_NORM, write=0.4, dropout=0.1),
    "scaled": scaled(12, GELU, pattern=replace(causal_pattern(SEQ_LEN), rotary=ROTARY)),
    "deepnorm": deepnorm(12),
    "magneto": magneto(12),
    "swiglu": stack(8, attention(pattern=alibi()), SWIGLU, norm_in=RMS, write=0.5),
    "dyt": stack(8, attention(value=2.0), feedforward(GELU, fc1=2.0), norm_in=NormTheory(alpha=0.8)),
    "value_mix": stack(12, *xavier(value_mix=0.5), norm_in=LAYER_NORM),
    "no_norm": stack(8, attention(), feedforward(LeakyRelu(0.2), output_scale=0.9), write=0.25),
    "catformer": catformer(8),
}


@pytest.mark.parametrize("name", STACKS)
def test_prediction_equals_a_random_stack(name):
    sublayers = STACKS[name]
    concat = sublayers[-1].concat
    variance = D_MODEL**-1 if name in ("pre", "post") else 1.0
    last = end(None if sublayers[0].norm_after else LAYER_NORM, D_MODEL if concat is None else sum(concat))
    trace = propagate(start(variance), sublayers, last)
    rng = np.random.default_rng(0)
    tokens, targets = (torch.from_numpy(rng.choice(VOCAB, size=(BATCH, SEQ_LEN), p=ZIPF)) for _ in range(2))
    table = torch.from_numpy(rng.standard_normal((VOCAB, D_MODEL)) * math.sqrt(variance)).float()
    d_ff = 3 * D_MODEL if name == "swiglu" else D_FF
    measured = simulate(table[tokens], targets, sublayers, last, heads=HEADS, d_ff=d_ff, vocab=VOCAB, seed=0)
    # Per-layer values of one draw scatter by about 1.4 / sqrt(d), gradients by more.
    for predicted, found, factor in (
        (trace.stream_variance, measured.stream_variance, 1.25),
        (trace.attention_branch_variance, measured.attention_branch_variance, 1.35),
        (trace.feedforward_branch_variance, measured.feedforward_branch_variance, 1.35),
        (trace.gradient_variance, measured.gradient_variance, 1.5),
    ):
        assert np.nanmax(np.abs(np.log(predicted / found))) < math.log(factor)
        assert np.array_equal(np.isnan(predicted), np.isnan(found))
    assert trace.token_correlation == pytest.approx(measured.token_correlation, abs=0.08)
    assert trace.attention_entropy[1:] == pytest.approx(measured.attention_entropy[1:], rel=0.05)


def test_peri_ln_grows_by_one_a_sublayer():
    trace = propagate(start(), stack(24, *xavier(), norm_in=LAYER_NORM, norm_branch=LAYER_NORM), end())
    assert trace.stream_variance == pytest.approx(1 + 2 * np.arange(25), rel=1e-12)


def test_post_norm_keeps_unit_variance_and_pre_norm_grows_with_depth():
    post = propagate(start(), stack(12, *xavier(), norm_after=LAYER_NORM), end(None))
    assert post.stream_variance == pytest.approx(np.ones(13), rel=1e-12)
    pre = propagate(start(1 / D_MODEL), stack(48, *xavier(), norm_in=LAYER_NORM), end())
    increments = np.diff(pre.stream_variance[24:])
    assert increments.max() < 1.1 * increments.min()
    assert pre.gradient_variance[1] > 25 * pre.gradient_variance[-1]


def test_scaled_streams_do_not_depend_on_depth():
    shallow, deep = (propagate(start(), scaled(n), end()) for n in (24, 96))
    assert deep.token_correlation[::4] == pytest.approx(shallow.token_correlation, abs=0.035)
    assert deep.gradient_variance[4::4] == pytest.approx(shallow.gradient_variance[1:], rel=0.12)


def test_collapsed_post_norm_stays_finite():
    """Rounding must not grow on the way down through layers whose tokens are equal to the last bit."""
    trace = propagate(start(1 / D_MODEL), stack(96, *xavier(), norm_after=LAYER_NORM), end(None))
    assert trace.token_correlation[-1] > 1 - 1e-9
    assert trace.gradient_variance[1:].max() < 10 * trace.gradient_variance[-1]
    assert np.linalg.eigvalsh(trace.gradient_kernel)[0] > -1e-9 * np.trace(trace.gradient_kernel)


def test_silent_branches_pass_all_through():
    trace = propagate(start(), stack(3, *xavier(), write=0.0), end(None))
    assert trace.kernel == pytest.approx(start(), rel=1e-12)
    token = 1 / D_MODEL / (BATCH * SEQ_LEN) ** 2
    assert trace.gradient_kernel == pytest.approx(token * start(), rel=1e-12)


def test_first_values_collect_the_gradients_of_all_layers():
    """With values of the first layer alone and no logits, x_0 gets g + N p^T g p after N layers."""
    sublayers = stack(3, attention(query=0.0, value_mix=1.0), feedforward())
    sublayers = [replace(s, write=0.0) if i % 2 else s for i, s in enumerate(sublayers)]
    trace = propagate(start(), sublayers, end(None))
    gradient = start() / D_MODEL / (BATCH * SEQ_LEN) ** 2
    p = np.tri(SEQ_LEN) / np.arange(1, SEQ_LEN + 1)[:, None]
    assert trace.gradient_kernel == pytest.approx(gradient + 3 * p.T @ gradient @ p, rel=1e-9)
    assert trace.kernel == pytest.approx(start() + 3 * p @ start() @ p.T, rel=1e-9)
    assert trace.gradient_variance[1:] == pytest.approx(np.full(3, gradient[0, 0]), rel=1e-9)


def test_dropout_on_the_branch_adds_noise_to_single_tokens_both_ways():
    first, second = SublayerTheory(attention(), write=0.0), SublayerTheory(feedforward())
    uncorrelated = replace(end(None), target_collision=0.0)
    plain, dropped = (propagate(start(), [first, replace(second, dropout=p)], uncorrelated) for p in (0.0, 0.2))
    gradient = plain.gradient_variance[-1]
    assert dropped.gradient_variance[0] - gradient == pytest.approx(1.25 * (plain.gradient_variance[0] - gradient))
    assert dropped.stream_variance[1] - 1 == pytest.approx(1.25 * (plain.stream_variance[1] - 1))
    assert dropped.kernel[0, 1] == pytest.approx(plain.kernel[0, 1], rel=1e-12)


def test_autoregressive_decay_attention_makes_its_kernel():
    """E-SPA (He et al. 2023): Cholesky factors L_l L_(l-1)^-1 as attention take the identity to exp(-gamma |i - j|)."""
    size = 24
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    kernel = before = np.eye(size)
    for gamma in (2.0, 0.5, 0.1, 0.02):
        after = np.exp(-gamma * distance)
        step = np.linalg.cholesky(after) @ np.linalg.inv(np.linalg.cholesky(before))
        rows, before = step.sum(axis=1), after
        with np.errstate(divide="ignore"):
            pattern = Pattern(np.log(np.maximum(np.tril(step) / rows[:, None], 0.0))[None], row_scale=rows)
        kernel, _, _ = attention_forward(attention(query=0.0, pattern=pattern), kernel, None)
    assert kernel == pytest.approx(np.exp(-0.02 * distance), abs=1e-9)


def test_memory_grows_with_the_square_root_of_the_depth():
    sublayers = stack(200, *xavier(), norm_in=LAYER_NORM)
    propagate(start(), sublayers[:2], end())
    tracemalloc.start()
    propagate(start(), sublayers, end())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    every_kernel = len(sublayers) * SEQ_LEN**2 * 8
    assert peak < every_kernel


def test_token_correlation_is_the_mean_cosine_of_pairs():
    kernel = np.array([[4.0, 2.0, 0.0], [2.0, 1.0, 0.5], [0.0, 0.5, 1.0]])
    assert token_correlation(kernel) == pytest.approx((1.0 + 0.0 + 0.5) / 3)
