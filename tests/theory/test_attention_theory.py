"""Attention's kernels against random attention bodies, path by path, and the identities they must obey."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from simulated_stack import Draw, attend

from stablelm.theory.attention import (
    AttentionBody,
    Pattern,
    attention_backward,
    attention_forward,
    causal_pattern,
    through_gate,
)
from stablelm.theory.kernels import NormTheory
from stablelm.theory.moments import gate_function

SEQ_LEN, D_MODEL, HEADS = 64, 256, 4
D_HEAD = D_MODEL // HEADS
ROTARY = 10000.0 ** -(np.arange(D_HEAD // 2) * 2 / D_HEAD)
DRAWS = 12


def make_body(pattern: Pattern | None = None, gain: float = 1.0, **keys) -> AttentionBody:
    """Square projections: queries and keys of that gain, all else 1."""
    return AttentionBody(
        pattern=pattern or causal_pattern(SEQ_LEN),
        query_gain=gain,
        key_gain=gain,
        value_gain=1.0,
        output_gain=1.0,
        query_back=gain,
        key_back=gain,
        value_back=1.0,
        output_back=1.0,
        scale=D_HEAD**-0.5,
        d_head=D_HEAD,
        **keys,
    )


def only(body: AttentionBody, path: str) -> AttentionBody:
    """The body whose gradient reaches its input by one projection."""
    return replace(body, **{f"{name}_back": 0.0 for name in ("query", "key", "value") if name != path})


def equal(r: float, size: int = SEQ_LEN) -> np.ndarray:
    return r + (1 - r) * np.eye(size)


def alibi(groups: int) -> Pattern:
    place = np.arange(SEQ_LEN, dtype=np.float64)
    distance = place[:, None] - place
    slopes = 2.0 ** -(8 * (1 + np.arange(groups)) / groups)
    return Pattern(np.where(distance >= 0, -slopes[:, None, None] * distance, -np.inf))


def correlated(r: float, rng: np.random.Generator) -> torch.Tensor:
    """(1, T, d) of unit variance with correlation r between tokens, exactly so for what they share."""
    noise = rng.standard_normal((SEQ_LEN + 1, D_MODEL))
    noise[0] *= np.sqrt(D_MODEL) / np.linalg.norm(noise[0])
    return torch.from_numpy(np.sqrt(r) * noise[:1] + np.sqrt(1 - r) * noise[1:]).float()[None]


class Kernels(NamedTuple):
    """Of the output, and of the gradients by way of queries, keys and values."""

    output: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def measure(body: AttentionBody, r: float, r_gradient: float) -> tuple[Kernels, float]:
    """Means over draws: the kernels, and the entropy of the rows."""
    rng, kernels, entropies = np.random.default_rng(1), [], []
    for seed in range(DRAWS):
        x = torch.nn.functional.layer_norm(correlated(r, rng), (D_MODEL,))
        inputs = (x.clone().requires_grad_(), x.clone().requires_grad_(), x.clone().requires_grad_())
        output, entropy, _ = attend(body, inputs, heads=HEADS, d_out=D_MODEL, draw=Draw(seed))
        found = (output, *torch.autograd.grad(output, inputs, correlated(r_gradient, rng)))
        matrices = [tensor.detach()[0].double().numpy() for tensor in found]
        kernels.append([matrix @ matrix.T / D_MODEL for matrix in matrices])
        entropies.append(entropy)
    return Kernels(*np.mean(kernels, axis=0)), float(np.mean(entropies))


def off_diagonal(kernel: np.ndarray) -> float:
    return float((kernel.sum() - np.trace(kernel)) / (kernel.size - len(kernel)))


VARIANTS = {
    "plain": make_body(),
    "sharp": make_body(gain=1.6),
    "rotary": make_body(replace(causal_pattern(SEQ_LEN), rotary=ROTARY)),
    "qk_norm": make_body(gain=3.0, qk_norm=True),
    "cap": make_body(gain=1.2, logit_cap=4.0),
    "alibi": make_body(alibi(2)),
    "row_scale": make_body(replace(causal_pattern(SEQ_LEN), row_scale=np.linspace(1.5, 0.5, SEQ_LEN))),
    "inner_norm": make_body(inner_norm=NormTheory(centred=True)),
    "null": make_body(null_logit=1.0),
    "null alibi": make_body(alibi(2), null_logit=0.0),
    "centred": make_body(gain=1.2, centred=True),
    "gate": make_body(gate=gate_function(0.0), gate_gain=1.0),
}
PLAIN = [("plain", r, r_gradient) for r in (0.0, 0.3, 0.6, 0.9) for r_gradient in (0.0, 0.5)]
OTHERS = [(name, r, 0.0) for name in VARIANTS if name != "plain" for r in (0.05, 0.5)]


@pytest.mark.parametrize(("name", "r", "r_gradient"), PLAIN + OTHERS)
def test_each_path_equals_random_attention(name, r, r_gradient):
    body = VARIANTS[name]
    measured, measured_entropy = measure(body, r, r_gradient)
    output, entropy, state = attention_forward(body, equal(r), None)
    assert np.trace(output) == pytest.approx(np.trace(measured.output), rel=0.06)
    assert off_diagonal(output) == pytest.approx(off_diagonal(measured.output), rel=0.06, abs=0.004)
    assert entropy == pytest.approx(measured_entropy, rel=0.02)
    total, predicted = sum(np.trace(kernel) for kernel in measured[1:]), 0.0
    for path in ("query", "key", "value"):
        trace = np.trace(attention_backward(only(body, path), state, equal(r_gradient), None)[0])
        assert trace == pytest.approx(np.trace(getattr(measured, path)), rel=0.17, abs=0.01 * total), path
        predicted += trace
    assert predicted == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("r", [0.05, 0.5])
def test_a_gate_has_a_gradient_of_its_own(r):
    """Against a gate of random weights on values that are independent of it."""
    body, rng, traces = make_body(gate=gate_function(0.0), gate_gain=1.0, gate_back=1.0), np.random.default_rng(3), []
    for _ in range(DRAWS):
        x = torch.nn.functional.layer_norm(correlated(r, rng), (D_MODEL,)).requires_grad_()
        mixed = correlated(r, rng) * torch.tril(torch.ones(SEQ_LEN, 1))
        gates = torch.sigmoid(x @ torch.from_numpy(rng.standard_normal((D_MODEL, D_MODEL))).float() / D_MODEL**0.5)
        (found,) = torch.autograd.grad(gates * mixed, x, correlated(0.0, rng))
        traces.append(found.double().square().mean().item())
    _, _, state = attention_forward(body, equal(r), None)
    state = state._replace(averaged=equal(r))
    predicted = np.diagonal(through_gate(body, state, equal(0.0))).mean()
    assert predicted == pytest.approx(np.mean(traces), rel=0.05)


def test_queries_and_keys_carry_half_of_the_gradient_of_uncorrelated_tokens():
    body = make_body()
    _, _, state = attention_forward(body, equal(0.0), None)
    whole = np.trace(attention_backward(body, state, equal(0.0), None)[0])
    assert whole > 2 * np.trace(attention_backward(only(body, "value"), state, equal(0.0), None)[0])


def test_paths_add_up_and_gradients_are_linear():
    body, gradient = VARIANTS["rotary"], equal(0.2)
    _, _, state = attention_forward(body, equal(0.4), None)
    whole = attention_backward(body, state, 3 * gradient, None)[0]
    parts = [attention_backward(only(body, path), state, gradient, None)[0] for path in ("query", "key", "value")]
    assert whole == pytest.approx(3 * sum(parts), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["plain", "sharp", "alibi"])
def test_rows_sum_to_one(name):
    """Equal tokens stay equal; logits' gradients cancel over the keys; a row with one key has none."""
    body = VARIANTS[name]
    same, _, _ = attention_forward(body, np.ones((SEQ_LEN, SEQ_LEN)), None)
    assert same == pytest.approx(np.ones_like(same), abs=1e-12)
    _, _, state = attention_forward(body, equal(0.3), None)
    to_keys = attention_backward(only(body, "key"), state, equal(0.5), None)[0]
    assert abs(to_keys.sum()) < 1e-9 * np.trace(to_keys)
    to_queries = attention_backward(only(body, "query"), state, equal(0.5), None)[0]
    assert abs(to_queries[0]).max() < 1e-12


def test_random_logits_move_only_what_keys_do_not_share_by_sums():
    """Values that are one part of each key beside a common one average alike, however a row is drawn."""
    part = np.linspace(-0.2, 0.2, SEQ_LEN)
    kernel = 1 + part[:, None] + part
    fixed, _, _ = attention_forward(make_body(gain=0.0), kernel, None)
    mixed, _, _ = attention_forward(make_body(gain=3.0, value_mix=1.0), equal(0.2), kernel)
    assert mixed == pytest.approx(fixed, rel=1e-9)


def test_values_keep_the_total_gradient_of_what_tokens_share():
    body = only(make_body(gain=1.6), "value")
    _, _, state = attention_forward(body, equal(0.3), None)
    gradient = equal(0.5)
    assert attention_backward(body, state, gradient, None)[0].sum() == pytest.approx(gradient.sum(), rel=1e-12)


def test_without_queries_attention_is_the_fixed_average():
    pattern = alibi(1)
    body = make_body(pattern, gain=0.0)
    p = np.exp(pattern.log_weights[0])
    p /= p.sum(axis=1, keepdims=True)
    kernel, gradient = equal(0.3), equal(0.1)
    output, _, state = attention_forward(body, kernel, None)
    assert output == pytest.approx(p @ kernel @ p.T, rel=1e-12)
    back, _ = attention_backward(body, state, gradient, None)
    assert back == pytest.approx(p.T @ gradient @ p, rel=1e-9)


def test_mixed_values_share_forward_and_backward():
    body = make_body(value_mix=0.25)
    first = equal(0.9)
    alone, _, lone = attention_forward(body, equal(0.0), None)
    mixed, _, state = attention_forward(body, equal(0.0), first)
    assert alone == pytest.approx(attention_forward(make_body(), equal(0.0), None)[0], rel=1e-12)
    assert mixed[0, 0] == pytest.approx(0.75**2 + 0.25**2)
    value = only(body, "value")
    gradient = equal(0.0)
    own, to_first = attention_backward(value, state, gradient, None)
    assert to_first is not None
    assert own * 0.25**2 == pytest.approx(to_first * 0.75**2, rel=1e-12)
    with_later, none = attention_backward(value, lone, gradient, to_first)
    assert none is None
    assert with_later == pytest.approx(attention_backward(value, lone, gradient, None)[0] + to_first, rel=1e-12)


def test_dropout_of_the_weights_adds_noise_to_single_tokens():
    plain, dropped = make_body(), make_body(dropout=0.2)
    output, _, state = attention_forward(plain, equal(0.3), None)
    noisy, _, noisy_state = attention_forward(dropped, equal(0.3), None)
    assert np.trace(noisy) > np.trace(output)
    assert noisy[0, 0] == pytest.approx(1.25)
    assert noisy - np.diag(np.diag(noisy)) == pytest.approx(output - np.diag(np.diag(output)), rel=1e-12)
    gradient = equal(0.0)
    clean = attention_backward(only(plain, "value"), state, gradient, None)[0]
    rough = attention_backward(only(dropped, "value"), noisy_state, gradient, None)[0]
    # Every drawn weight's second moment grows by 1 / (1 - p); uncorrelated gradients see nothing else.
    assert np.diag(rough) == pytest.approx(1.25 * np.diag(clean), rel=1e-9)
