"""Kernels of norms and feed-forward bodies against draws of many independent features."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.theory.kernels import (
    FeedForwardBody,
    NormTheory,
    feedforward_backward,
    feedforward_forward,
    norm_backward,
    norm_forward,
    norm_slopes,
    times_diagonal,
)
from stablelm.theory.moments import GELU, RELU, SILU, LeakyRelu

FEATURES = 400_000
KERNEL = np.array([[0.5, 0.4], [0.4, 2.0]])
GRADIENT = np.array([[1.0, 0.5], [0.5, 1.5]])
NORMS = {"layernorm": NormTheory(centred=True, scale=0.5), "rmsnorm": NormTheory(eps=0.1), "dyt": NormTheory(alpha=0.7)}
ACTIVATIONS = {
    "relu": (RELU, F.relu),
    "gelu": (GELU, F.gelu),
    "leaky": (LeakyRelu(0.3), partial(F.leaky_relu, negative_slope=0.3)),
    "swiglu": (SILU, F.silu),
}


def features(kernel: np.ndarray, seed: int) -> Tensor:
    """(tokens, FEATURES): independent Gaussian features with that kernel between the tokens."""
    noise = np.random.default_rng(seed).standard_normal((len(kernel), FEATURES))
    return torch.from_numpy(np.linalg.cholesky(kernel) @ noise).requires_grad_()


def kernel_of(x: Tensor) -> np.ndarray:
    return (x @ x.T).detach().numpy() / FEATURES


def normalise(norm: NormTheory, x: Tensor) -> Tensor:
    if norm.alpha is not None:
        return norm.scale * torch.tanh(norm.alpha * x)
    if norm.centred:
        x = x - x.mean(dim=1, keepdim=True)
    return norm.scale * x / (x.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_equal_random_features(norm):
    x = features(KERNEL, 0)
    y = normalise(norm, x)
    (back,) = torch.autograd.grad(y, x, features(GRADIENT, 1))
    assert norm_forward(norm, KERNEL) == pytest.approx(kernel_of(y), rel=0.02)
    assert norm_backward(norm, KERNEL, GRADIENT) == pytest.approx(kernel_of(back), rel=0.02)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_gradient_keeps_its_product_with_another_but_for_the_norms_slopes(norm):
    """Of E[(J^T g)_a . h_b] / width, g and h having features in common; what the norm projects out is little."""
    x, both = features(KERNEL, 0), features(GRADIENT, 1)
    (back,) = torch.autograd.grad(normalise(norm, x), x, both)
    cross = (back @ both.T).detach().numpy() / FEATURES
    assert norm_slopes(norm, KERNEL)[:, None] * GRADIENT == pytest.approx(cross, rel=0.02)
    assert (norm_slopes(None, KERNEL) == 1).all()


@pytest.mark.parametrize("inner_norm", [None, NormTheory(centred=True), NormTheory()])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feedforward_equals_random_features(activation, inner_norm):
    """fc1's and the gate's products are Gaussian features; gains of fc2 act on the kernels alone."""
    function, act = ACTIVATIONS[activation]
    body = FeedForwardBody(
        function, fc1_gain=1.5, fc2_gain=2.0, fc1_back=3.0, fc2_back=0.5, gate_gain=0.8, gate_back=1.2,
        inner_norm=inner_norm, output_scale=0.9, gated=activation == "swiglu",
    )  # fmt: skip
    hidden, gate = features(body.fc1_gain * KERNEL, 0), features(body.gate_gain * KERNEL, 1)
    active = act(gate) * hidden if body.gated else act(hidden)
    active = active * body.output_scale
    if inner_norm is not None:
        active = normalise(inner_norm, active)
    to_active = features(body.fc2_back * GRADIENT, 2)
    to_hidden, to_gate = torch.autograd.grad(active, (hidden, gate), to_active, allow_unused=True)
    back = body.fc1_back * kernel_of(to_hidden)
    if to_gate is not None:
        back = back + body.gate_back * kernel_of(to_gate)
    output, state = feedforward_forward(body, KERNEL)
    assert output == pytest.approx(body.fc2_gain * kernel_of(active), rel=0.02)
    assert feedforward_backward(body, state, GRADIENT) == pytest.approx(back, rel=0.02)


def test_no_norm_and_no_noise_leave_a_kernel_alone():
    assert norm_forward(None, KERNEL) is KERNEL
    assert norm_backward(None, KERNEL, GRADIENT) is GRADIENT
    assert times_diagonal(KERNEL, 1.0) is KERNEL
    assert times_diagonal(KERNEL, 1.5) == pytest.approx(np.array([[0.75, 0.4], [0.4, 3.0]]))
