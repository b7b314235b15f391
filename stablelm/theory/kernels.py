"""Norms and feed-forward bodies on token kernels, forward and backward.

At infinite width a model at initialisation is described by its token kernel K_ab = E[x_a . x_b] / width, and its
backward pass by the gradient kernel G_ab = E[dL/dx_a . dL/dx_b] / width, both (T, T) over the positions of one
sequence: weights are independent of what they multiply, forward and backward (Poole et al. 2016, Schoenholz et al.
2017, Yang & Schoenholz 2017). Kernels are uncentred, in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.moments import TANH, Function

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NormTheory:
    """A norm over the features of each token, its learned gain at 1.

    It divides by the root of the mean square, or, with `alpha`, is tanh(alpha x). `centred`: it takes the mean over
    the features away first; `scale` multiplies the output; `eps` is added to the mean square.
    """

    centred: bool = False
    scale: float = 1.0
    alpha: float | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class FeedForwardBody:
    """fc2(act(fc1 x)), or, if `gated`, fc2(act(gate x) * fc1 x).

    `fc1_gain`, `fc2_gain`, `gate_gain`: fan_in * std^2, variance of the product over the second moment of its input;
    `fc1_back`, `fc2_back`, `gate_back`: fan_out * std^2, the same for gradients. `output_scale` multiplies the
    function's output; `inner_norm` sits between it and fc2.
    """

    function: Function
    fc1_gain: float
    fc2_gain: float
    fc1_back: float
    fc2_back: float
    gate_gain: float = 0.0
    gate_back: float = 0.0
    inner_norm: NormTheory | None = None
    output_scale: float = 1.0
    gated: bool = False


class FeedForwardState(NamedTuple):
    """What the backward pass needs: the kernels of fc1's and the gate's output and of what the inner norm reads."""

    hidden: Array
    gate: Array
    activated: Array


def columns_and_rows(kernel: Array) -> tuple[Array, Array]:
    """The diagonal of a kernel as (T, 1) and as (1, T)."""
    diagonal = np.diagonal(kernel)
    return diagonal[:, None], diagonal[None, :]


def times_diagonal(kernel: Array, factor: float) -> Array:
    """The kernel with its diagonal multiplied: noise that is independent between tokens, as dropout's."""
    if factor == 1.0:
        return kernel
    result = kernel.copy()
    result[np.diag_indices_from(result)] *= factor
    return result


def norm_forward(norm: NormTheory | None, kernel: Array) -> Array:
    """Kernel of the norm's output; features are taken to have mean zero. None: the kernel itself.

    tanh(alpha x) is an odd activation of Gaussian features (Zhu et al. 2025, arXiv 2503.10622).
    """
    if norm is None:
        return kernel
    if norm.alpha is not None:
        inside = norm.alpha**2 * kernel
        a, b = columns_and_rows(inside)
        return norm.scale**2 * TANH.dual(a, inside, b)
    return norm.scale**2 * kernel / _variances(norm, kernel)


def norm_backward(norm: NormTheory | None, kernel: Array, gradient: Array) -> Array:
    """Gradient kernel at the norm's input, from its input's `kernel` and the gradient kernel at its output.

    Layernorm divides a gradient by its token's std (Xiong et al. 2020); the directions it projects out are one or
    two of many.
    """
    if norm is None:
        return gradient
    if norm.alpha is not None:
        inside = norm.alpha**2 * kernel
        a, b = columns_and_rows(inside)
        return norm.scale**2 * norm.alpha**2 * gradient * TANH.dual_slope(a, inside, b)
    return norm.scale**2 * gradient / _variances(norm, kernel)


def norm_slopes(norm: NormTheory | None, kernel: Array) -> Array:
    """What a gradient is multiplied with on its way through the norm, the mean over features, by token (T,)."""
    if norm is None:
        return np.ones(len(kernel))
    if norm.alpha is not None:
        inside = norm.alpha**2 * np.diagonal(kernel)
        # Of two independent features the mean product is the product of the means.
        return norm.scale * norm.alpha * np.sqrt(TANH.dual_slope(inside, np.zeros_like(inside), inside))
    return norm.scale / np.sqrt(np.diagonal(kernel) + norm.eps)


def _variances(norm: NormTheory, kernel: Array) -> Array:
    std = np.sqrt(np.diagonal(kernel) + norm.eps)
    return np.outer(std, std)


def feedforward_forward(body: FeedForwardBody, kernel: Array) -> tuple[Array, FeedForwardState]:
    """Kernel of the body's output from that of its input, and the state for `feedforward_backward`."""
    hidden, gate = body.fc1_gain * kernel, body.gate_gain * kernel
    a, b = columns_and_rows(hidden)
    if body.gated:
        gate_a, gate_b = columns_and_rows(gate)
        activated = body.function.dual(gate_a, gate, gate_b) * hidden
    else:
        activated = body.function.dual(a, hidden, b)
    if body.inner_norm is not None and body.inner_norm.centred:
        mean = _feature_mean(body, np.diagonal(hidden))
        activated = activated - np.outer(mean, mean)
    activated = body.output_scale**2 * activated
    return body.fc2_gain * norm_forward(body.inner_norm, activated), FeedForwardState(hidden, gate, activated)


def _feature_mean(body: FeedForwardBody, variance: Array) -> Array:
    """Mean over the features of each token's activation, which a layernorm takes away."""
    return np.zeros_like(variance) if body.gated else body.function.mean(variance)


def feedforward_backward(body: FeedForwardBody, state: FeedForwardState, gradient: Array) -> Array:
    """Gradient kernel at the body's input from the one at its output."""
    gradient = norm_backward(body.inner_norm, state.activated, body.fc2_back * gradient)
    gradient = body.output_scale**2 * gradient
    a, b = columns_and_rows(state.hidden)
    if body.gated:
        gate_a, gate_b = columns_and_rows(state.gate)
        through_value = body.fc1_back * body.function.dual(gate_a, state.gate, gate_b)
        through_gate = body.gate_back * body.function.dual_slope(gate_a, state.gate, gate_b) * state.hidden
        return gradient * (through_value + through_gate)
    return body.fc1_back * gradient * body.function.dual_slope(a, state.hidden, b)
