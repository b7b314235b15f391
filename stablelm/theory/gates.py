"""A recurrent unit's gate in place of a skip connection, on token kernels, forward and backward (derived here).

The gate is (1 - z) x + z h of the stream x and the branch f, with y = relu(f) and independent Gaussian matrices:

    r = s(W_r y + U_r x),  z = s(W_z y + U_z x - b),  h = tanh(W_g y + U_g (r x)),  s the logistic function.

An entry of z, r and h's argument comes from rows of matrices that x's own entry has no part in, so gates and stream
are independent feature by feature, and kernels multiply. h is odd in matrices of its own: no cross term of x and h.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.kernels import columns_and_rows, times_diagonal
from stablelm.theory.moments import RELU, TANH, Expanded, Function

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GateTheory:
    """`gain`: width * std^2 of the six square matrices; `bias`: b, which holds the gate closed."""

    gain: float
    bias: float


class GateState(NamedTuple):
    """Kernels of y, of the arguments of r and z before b, of r, z, 1 - z and h, and of the argument of h."""

    rectified: Array
    argument: Array
    reset: Array
    update: Array
    closed: Array
    candidate: Array
    candidate_argument: Array


@lru_cache
def logistic(bias: float) -> Expanded:
    """x -> s(x - bias)."""

    def function(x: Array) -> Array:
        return 0.5 * (1.0 + np.tanh(0.5 * (x - bias)))

    return Expanded(f"logistic {bias}", function, lambda x: function(x) * (1.0 - function(x)))


def gate_forward(gate: GateTheory, stream: Array, branch: Array, dropout: float) -> tuple[Array, GateState]:
    """Kernel of the stream after it, from those before it and of the branch before its dropout."""
    rectified = times_diagonal(_dual(RELU, branch), 1 / (1 - dropout))
    argument = gate.gain * (rectified + stream)
    reset, update = _dual(logistic(0.0), argument), _dual(logistic(gate.bias), argument)
    closed = _dual(logistic(-gate.bias), argument)  # 1 - s(x - b) = s(b - x), and x is symmetric
    inner = gate.gain * (rectified + reset * stream)
    candidate = _dual(TANH, inner)
    state = GateState(rectified, argument, reset, update, closed, candidate, inner)
    return closed * stream + update * candidate, state


def gate_backward(
    gate: GateTheory, state: GateState, stream: Array, branch: Array, gradient: Array, dropout: float
) -> tuple[Array, Array]:
    """Gradient kernels at the stream and at the branch before its dropout, from the one after the gate."""
    to_update = gradient * (state.candidate + stream) * _slope(logistic(gate.bias), state.argument)
    to_candidate = gradient * state.update * _slope(TANH, state.candidate_argument)
    through_reset = gate.gain * to_candidate
    to_reset = through_reset * stream * _slope(logistic(0.0), state.argument)
    to_stream = state.closed * gradient + state.reset * through_reset + gate.gain * (to_update + to_reset)
    to_rectified = gate.gain * (to_update + to_reset + to_candidate)
    return to_stream, times_diagonal(to_rectified, 1 / (1 - dropout)) * _slope(RELU, branch)


def gated_sensitivity(
    gate: GateTheory, branch_variances: Array, matrices: Array, embedding_variance: float, dropout: float
) -> float:
    """Sensitivity (`theory.sensitivity`) of the stream after gates of these branches, from their variances and numbers
    of matrices; the gate's own six matrices change too, and as in a sum a branch changes as much as what it reads."""
    stream, change = np.full((1, 1), embedding_variance), np.zeros((1, 1))
    for variance, count in zip(branch_variances, matrices, strict=True):
        branch = np.full((1, 1), variance)
        stream, change = _changed(gate, stream, branch, dropout, change, variance * (change / stream + count))
    return (change / stream).item()


def _changed(
    gate: GateTheory, stream: Array, branch: Array, dropout: float, of_stream: Array, of_branch: Array
) -> tuple[Array, Array]:
    """The stream's variance after the gate, and that of its change: changes of x, f and each matrix are independent."""
    after, state = gate_forward(gate, stream, branch, dropout)
    rectified = times_diagonal(of_branch * _slope(RELU, branch), 1 / (1 - dropout))
    of_argument = state.argument + gate.gain * (rectified + of_stream)
    of_update = _slope(logistic(gate.bias), state.argument) * of_argument
    of_reset = _slope(logistic(0.0), state.argument) * of_argument
    of_inner = state.candidate_argument + gate.gain * (rectified + state.reset * of_stream + stream * of_reset)
    of_candidate = _slope(TANH, state.candidate_argument) * of_inner
    return after, state.closed * of_stream + (stream + state.candidate) * of_update + state.update * of_candidate


def _dual(function: Function, kernel: Array) -> Array:
    a, b = columns_and_rows(kernel)
    return function.dual(a, kernel, b)


def _slope(function: Function, kernel: Array) -> Array:
    a, b = columns_and_rows(kernel)
    return function.dual_slope(a, kernel, b)
