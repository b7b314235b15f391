"""Causal softmax attention on token kernels, forward and backward (derived here; checked against simulation).

With p the attention weights that fixed biases alone give, and P those with random logits, everything rests on
E[P_aj P_bk] = p_aj p_bk (1 + c_ab (delta_jk - p_bj - p_ak + sum_m p_am p_bm)): what random logits do to first order
where all keys are alike, with rows that sum to one. The size c_ab comes from the covariance of the two rows' logits
about their row means, such that a single row has its exact E[sum P^2] (`theory.rows`). Keys of the same token are
drawn together as a key is with itself (`theory.repeats`): the forward pass adds them to delta_jk with a size of their
own.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.hermite import expectation
from stablelm.theory.kernels import NormTheory, columns_and_rows, norm_backward, norm_forward
from stablelm.theory.moments import Function, dyt_second_moment
from stablelm.theory.repeats import Repeats, roots, token_correlation
from stablelm.theory.rows import row_fluctuations

Array = NDArray[np.float64]

_UNIT = NormTheory()
_LARGEST = 50.0  # keeps exp within range; no row moves by then


@dataclass(frozen=True, eq=False)
class Pattern:
    """What positions do to attention; share one object between layers, for its tables are cached by identity.

    `log_weights`: (groups, T, T), added to the logits of equally large groups of heads, -inf where a query may not
    look; `row_scale`: (T,), multiplies each row of the heads' output (E-SPA, He et al. 2023); `rotary`: (d_head / 2,),
    angles in radians that a step of one position turns each pair of features of queries and keys (Su et al. 2021).
    """

    log_weights: Array
    row_scale: Array | None = None
    rotary: Array | None = None


@lru_cache(maxsize=4)
def causal_pattern(seq_len: int) -> Pattern:
    """No biases: each query looks at all keys up to its own position."""
    return Pattern(np.where(np.tri(seq_len, dtype=bool), 0.0, -np.inf)[None])


@dataclass(frozen=True)
class AttentionBody:
    """Multi-head attention with its projections; all widths are those of all query heads together.

    `query_gain`, `key_gain`, `value_gain`: fan_in * std^2 of the projection, its output's variance over its input's
    second moment; `output_gain`: d_attention * std^2 of the output projection. `query_back`, `key_back`,
    `value_back`: d_attention * std^2 (with fewer key/value heads than query heads the gradients of a group of query
    heads add up, so d_attention counts all the same); `output_back`: fan_out * std^2. `scale` multiplies query . key;
    `logit_cap` c makes logits c tanh(logit / c); `qk_norm`: queries and keys of each head have unit RMS.
    `inner_norm` is over all heads together, before the output projection. `value_mix` m: values are
    (1 - m) own + m those of the first attention body that is propagated, which itself mixes nothing (Zhou et al.
    2025); None: off. `dropout` is that of the attention weights. `null_logit`: of one more term in the denominator of
    the softmax; None: there is none. `centred`: the identity is added to the weights, and their mean subtracted (Noci
    et al. 2023), all but the identity times `average`. `gate`, of inputs of gain `gate_gain` (`gate_back` as the
    others), multiplies what heads give. `draw_variance`: relative variance of the branch's size between draws of the
    value and output maps where all tokens are alike, 2 / features of each.
    """

    pattern: Pattern
    query_gain: float
    key_gain: float
    value_gain: float
    output_gain: float
    query_back: float
    key_back: float
    value_back: float
    output_back: float
    scale: float
    d_head: int
    qk_norm: bool = False
    logit_cap: float | None = None
    inner_norm: NormTheory | None = None
    value_mix: float | None = None
    dropout: float = 0.0
    null_logit: float | None = None
    centred: bool = False
    average: float = 1.0
    gate: Function | None = None
    gate_gain: float = 0.0
    gate_back: float = 0.0
    draw_variance: float = 0.0


class _Tables(NamedTuple):
    """Of a pattern, (groups, T, T) but for `turn`: p; sum_j p_aj p_bj; mean cosine of the angle between positions
    a and b, (T, T) or 1; and of that between keys, weighted with p_aj p_bk over j != k, or 1."""

    p: Array
    overlap: Array
    turn: Array | float
    turn_keys: Array | float


class _Fluctuations(NamedTuple):
    """Of random softmax rows: c_ab, (groups, T, T); (groups, T): RMS slope of a row over that of p, and its entropy
    in nats; the share of a row's weight that keys get, (groups, T) or 1; and the size, times their share, for two keys
    of the same token, (groups, T, T), 0 if there are none."""

    size: Array
    slope: Array
    entropy: Array
    kept: Array | float = 1.0
    repeated: Array | float = 0.0


class AttentionState(NamedTuple):
    """What the backward pass needs: kernels, (T, T), of the body's input, of its keys (and queries) but for their
    gain, of the values, of what heads average, and of the heads' output after the gate; the first body's share in the
    values; the rows' fluctuations; the correlation in the heads' output of two positions with the same token, nan if
    none are told of."""

    kernel: Array
    keys: Array
    values: Array
    averaged: Array
    mixed: Array
    mix: float
    rows: _Fluctuations
    repeated: float = np.nan


@lru_cache(maxsize=8)
def _tables(pattern: Pattern) -> _Tables:
    weights = np.exp(pattern.log_weights - pattern.log_weights.max(axis=-1, keepdims=True))
    p = weights / weights.sum(axis=-1, keepdims=True)
    overlap = p @ _transposed(p)
    if pattern.rotary is None:
        return _Tables(p, overlap, 1.0, 1.0)
    place = np.arange(p.shape[-1], dtype=np.float64)
    phase = np.exp(1j * place[:, None] * pattern.rotary)  # (T, d_head / 2)
    turn = np.real(phase @ phase.conj().T) / pattern.rotary.size
    mean = (p @ phase) * phase.conj()
    turn_keys = np.real(mean @ _transposed(mean).conj()) / pattern.rotary.size
    return _Tables(p, overlap, turn, _off_diagonal(turn_keys, overlap * turn, overlap))


def _transposed(matrices: Array) -> Array:
    return np.swapaxes(matrices, -1, -2)


def _off_diagonal(whole: Array, diagonal: Array, overlap: Array) -> Array:
    """Mean over j != k under p_aj p_bk of what sums to `whole`, and to `diagonal` over j = k; 0 for rows of one key."""
    rest = 1 - overlap
    return np.divide(whole - diagonal, rest, out=np.zeros_like(rest), where=rest > 1e-9)


def _sandwich(p: Array, kernel: Array) -> Array:
    """sum_jk p_aj K_jk p_bk."""
    return p @ kernel @ _transposed(p)


def _shared(p: Array, kernel: Array) -> Array:
    """sum_j p_aj K_jj p_bj."""
    return (p * np.diagonal(kernel)) @ _transposed(p)


def attention_forward(
    body: AttentionBody, kernel: Array, first: Array | None, repeats: Repeats | None = None
) -> tuple[Array, float, AttentionState]:
    """Kernel of the body's output, mean entropy of its rows in nats, and the state for the backward pass.

    `kernel`: (T, T), of the body's input; `first`: values' kernel of the first attention body, None for itself;
    `repeats`: positions with the same token among those that `kernel` is the mean of.
    """
    keys = norm_forward(_UNIT, kernel) if body.qk_norm else kernel
    mix = 0.0 if first is None or body.value_mix is None else body.value_mix
    own = (1 - mix) ** 2 * body.value_gain * kernel
    values = own + mix**2 * first if first is not None and mix else own
    rows, correlation = _fluctuations(body, keys, keys, None), np.nan
    drawn, shared = rows, 0.0
    if repeats is not None:
        drawn, shared = _fluctuations(body, keys, keys, repeats), _shared_values(own, values, repeats)
    averaged = _averaged(body, values, values, drawn, shared)
    mixed = averaged * _gates(body, kernel)
    if repeats is not None:
        same = _fluctuations(body, keys, _alike(keys, repeats.correlation), repeats)
        alike = _averaged(body, values, _alike(values, shared), same, shared)
        alike = alike * _gates(body, _alike(kernel, repeats.correlation))
        np.fill_diagonal(alike, np.diagonal(mixed))
        correlation = token_correlation(alike)
    output = body.output_gain * norm_forward(body.inner_norm, mixed)
    state = AttentionState(kernel, keys, values, averaged, mixed, mix, rows, correlation)
    return output, float(drawn.entropy.mean()), state


def _shared_values(own: Array, values: Array, repeats: Repeats) -> float:
    """Correlation of the values of two positions with the same token; `own`: the layer's part of their kernel."""
    of_own, whole = np.diagonal(own).mean(), np.diagonal(values).mean()
    return float((of_own * repeats.correlation + (whole - of_own) * repeats.first) / whole)


def _alike(kernel: Array, correlation: float) -> Array:
    """That between a position and one with the token of the other."""
    return np.maximum(kernel, correlation * roots(kernel))


def branch_spread(body: AttentionBody, state: AttentionState) -> float:
    """Relative standard deviation of the branch's variance, a mean over positions, between draws of its maps.

    A map of d outputs gives the mean of C_aa over positions a relative variance of 2 / d times the mean of C_ab^2, for
    tokens of correlations C: of d independent features each has that for d = 1 (fourth moments of Gaussians; derived
    here). Fewer key/value heads have fewer features.
    """
    scale = roots(state.mixed)
    correlations = np.divide(state.mixed, scale, out=np.zeros_like(scale), where=scale > 0)
    return float(np.sqrt(body.draw_variance * (correlations**2).mean()))


def _averaged(body: AttentionBody, values: Array, straight: Array, rows: _Fluctuations, correlation: float) -> Array:
    """Kernel of what heads average; `correlation`: of the values of two positions with the same token.

    `straight`: of the values that a centred body adds to these.
    """
    p, overlap, _, _ = _tables(body.pattern)
    seen = values @ _transposed(p)  # (groups, key, row)
    mean, shared, one_sided = p @ seen, _shared(p, values), p @ (_transposed(p) * seen)
    both_sided = one_sided + _transposed(one_sided)
    mixed = rows.size * (shared - both_sided + overlap * mean)
    if isinstance(rows.repeated, np.ndarray):
        repeated = correlation * (_sandwich(p, roots(values)) - shared)
        mixed = mixed + rows.repeated * (repeated - 2 * mean + both_sided + (1 - overlap) * mean)
        mixed = mixed - rows.repeated * _off_diagonal(
            repeated - (mean - shared), np.zeros_like(mean), overlap
        ) * _twice(p)
    if not body.centred:
        mixed = mixed + mean
    if body.dropout:
        noise = body.dropout / (1 - body.dropout) * shared * (1 + rows.size * (1 - overlap))
        mixed = mixed + noise * np.eye(len(values))
    averaged = body.average**2 * _scaled_rows(rows.kept, mixed).mean(axis=0)
    if body.centred:
        averaged = averaged + straight
    if body.pattern.row_scale is not None:
        averaged = averaged * np.outer(body.pattern.row_scale, body.pattern.row_scale)
    return averaged


def _twice(p: Array) -> Array:
    """sum_j p_aj sum_{k != j} p_bk^2 and the same with the rows exchanged.

    A key k with the token of j is both in the weight that is drawn to j and in the values that are alike there, which
    the product of the two means misses.
    """
    one = np.square(p).sum(axis=-1)[:, None, :] - p @ _transposed(np.square(p))
    return one + _transposed(one)


def _gates(body: AttentionBody, kernel: Array) -> Array | float:
    """E[gate_a gate_b] for inputs of that kernel."""
    if body.gate is None:
        return 1.0
    inside = body.gate_gain * kernel
    return body.gate.dual(*_with_variances(inside))


def _with_variances(kernel: Array) -> tuple[Array, Array, Array]:
    """k_aa, k_ab and k_bb, as functions of pairs take them."""
    rows, columns = columns_and_rows(kernel)
    return rows, kernel, columns


def _scaled_rows(scale: Array | float, matrices: Array) -> Array:
    """scale_a M_ab scale_b; a number counts as such a vector."""
    return _both(scale, matrices) if isinstance(scale, np.ndarray) else matrices * scale**2


def _fluctuations(body: AttentionBody, keys: Array, queries: Array, repeats: Repeats | None) -> _Fluctuations:
    """How far random logits draw the rows from their mean, for keys and queries of these kernels.

    With `repeats` the logits of keys with different tokens are what the others are compared with, and a row has as
    many keys as different tokens.
    """
    p, overlap, turn, turn_keys = _tables(body.pattern)
    same = _shared(p, keys)
    apart = _off_diagonal(_sandwich(p, keys), same, overlap)
    alike = np.divide(same, overlap, out=np.zeros_like(same), where=overlap > 0)
    gain = body.scale**2 * body.d_head * (1.0 if body.qk_norm else body.query_gain * body.key_gain)
    excess_apart, share = _excess_apart(p, overlap, keys, same, apart, repeats)
    apart = apart - share * excess_apart
    covariance = gain * queries * (turn * alike - turn_keys * apart)
    variance = gain * np.diagonal(queries) * (p @ np.diagonal(keys))
    kept, cap_slope = _cap(body.logit_cap, variance)
    spread = kept * np.maximum(np.einsum("gaa->ga", covariance), 0.0)
    own_overlap = np.einsum("gaa->ga", overlap)
    one_key = own_overlap > 1 - 1e-9
    together = gain * queries * turn_keys * excess_apart
    alike_share = np.divide(np.einsum("gaa->ga", together) * kept, spread, out=np.zeros_like(spread), where=spread > 0)
    effective = own_overlap + share * np.clip(alike_share, 0.0, 1.0) * (1 - own_overlap)
    rows = row_fluctuations(spread, 1 / effective)
    damping = np.sqrt(kept * np.divide(rows.growth, spread, out=np.ones_like(spread), where=spread > 0))
    excess = np.expm1(np.clip(_both(damping, covariance), -_LARGEST, _LARGEST))
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1) - np.where(one_key, 0.0, rows.entropy_loss)
    entropy, of_keys = np.maximum(entropy, 0.0), 1.0
    if body.null_logit is not None:
        # What keys of different tokens share is common to the row, so repeats are in `spread` alone.
        of_keys = _share_of_keys(body.pattern, spread, kept * variance - spread, body.null_logit)
        entropy = of_keys * (entropy - np.log(of_keys))
    drawn = np.expm1(np.clip(_both(damping, together), -_LARGEST, _LARGEST)) * share
    whole = 1 + excess * overlap + drawn * (1 - overlap)
    slope = np.sqrt(rows.slope_share * cap_slope)
    return _Fluctuations(excess / whole, slope, entropy, of_keys, drawn / whole if share else 0.0)


def _excess_apart(
    p: Array, overlap: Array, keys: Array, same: Array, apart: Array, repeats: Repeats | None
) -> tuple[Array, float]:
    """What keys of the same token share over what others do, as means under p_aj p_bk, and these pairs' share.

    `same`, `apart`: the sum of keys' kernel over j = k, and its mean over j != k.
    """
    if repeats is None or repeats.share >= 1:
        return np.zeros_like(apart), 0.0
    repeated = repeats.correlation * _off_diagonal(_sandwich(p, roots(keys)), same, overlap)
    return np.maximum(repeated - apart, 0.0) / (1 - repeats.share), repeats.share


def _share_of_keys(pattern: Pattern, spread: Array, common: Array, null_logit: float) -> Array:
    """(groups, T): the weight of all keys of a row beside a key of a fixed logit, whose value is zero.

    sum_j e^(b_j + z_j) is taken at its mean, but for what all logits of the row have in common, whose variance is
    `common`: E[sigmoid(m + c)] is near sigmoid(m / sqrt(1 + pi var(c) / 8)).
    """
    largest = pattern.log_weights.max(axis=-1)
    sums = np.log(np.exp(pattern.log_weights - largest[..., None]).sum(axis=-1)) + largest + spread / 2
    return 1 / (1 + np.exp((null_logit - sums) / np.sqrt(1 + np.pi / 8 * np.maximum(common, 0.0))))


def _both(rows: Array, matrix: Array) -> Array:
    """rows_a M_ab rows_b."""
    return rows[..., :, None] * matrix * rows[..., None, :]


def _cap(cap: float | None, variance: Array) -> tuple[Array, Array]:
    """Variance that cap tanh(x / cap) keeps of Gaussian logits x, as a share, and its mean squared slope.

    The slope is averaged as attention weighs the keys. What is capped is taken for Gaussian: E[sum P^2] comes out a
    tenth too high at a cap of two standard deviations.
    """
    if cap is None:
        return np.ones_like(variance), np.ones_like(variance)

    def weight(x: Array) -> Array:
        return np.exp(cap * np.tanh(x / cap))

    squashed = cap**2 * np.asarray(dyt_second_moment(1 / cap, variance))
    kept = np.divide(squashed, variance, out=np.ones_like(variance), where=variance > 0)
    slope = expectation(lambda x: weight(x) * (1 - np.tanh(x / cap) ** 2) ** 2, variance)
    return kept, slope / expectation(weight, variance)


def attention_backward(
    body: AttentionBody, state: AttentionState, gradient: Array, later: Array | None
) -> tuple[Array, Array | None]:
    """Gradient kernels at the body's input and at the first body's values (None unless these are mixed in).

    `gradient` is that at the body's output; `later`, for the first body alone, the one at its values from all the
    bodies above. Noise that dropout of the weights adds to the gradients of queries and keys is left out.
    """
    (p, overlap, _, _), size = _tables(body.pattern), state.rows.size
    outer = norm_backward(body.inner_norm, state.mixed, body.output_back * gradient)
    result = through_gate(body, state, outer)
    outer = outer * _gates(body, state.kernel)
    if body.pattern.row_scale is not None:
        outer = outer * np.outer(body.pattern.row_scale, body.pattern.row_scale)
    straight, outer = outer, body.average**2 * _scaled_rows(state.rows.kept, outer)
    drawn = size * outer
    pulled = drawn @ p
    one_sided = _transposed(pulled * p) @ p
    whole = drawn * overlap if body.centred else outer + drawn * overlap
    to_values = _transposed(p) @ whole @ p - one_sided - _transposed(one_sided)
    noise = (p * pulled).sum(axis=1)
    if body.dropout:
        own_row = np.einsum("gaa->ga", outer * (1 + size * (1 - overlap)))
        noise = noise + body.dropout / (1 - body.dropout) * (p**2 * own_row[:, :, None]).sum(axis=1)
    to_values = to_values.mean(axis=0) + np.diag(noise.mean(axis=0))
    if body.centred:
        to_values = to_values + straight
    to_first = state.mix**2 * to_values if state.mix else None
    if later is not None:
        to_values = to_values + later
    result = result + (1 - state.mix) ** 2 * body.value_back * to_values
    if body.query_back or body.key_back:
        result = result + _through_logits(body, state, outer)
    # Asymmetry from rounding would grow on the way down.
    return (result + result.T) / 2, to_first


def through_gate(body: AttentionBody, state: AttentionState, outer: Array) -> Array | float:
    """Gradient kernel at the body's input by way of the gate; `outer`: that at what it multiplies.

    A gate's logit gets g o gate' of each feature that it multiplies, so one of a head gets the sum over d_head.
    """
    if body.gate is None:
        return 0.0
    slopes = body.gate.dual_slope(*_with_variances(body.gate_gain * state.kernel))
    return body.gate_back * outer * state.averaged * slopes


def _through_logits(body: AttentionBody, state: AttentionState, outer: Array) -> Array:
    """Gradient kernel at the body's input by way of the queries and of the keys; `outer`: that at the heads' output.

    The gradient of logit aj is P_aj g_a . (v_j - o_a): its kernel is that of g times the values' kernel centred in
    both rows, times E[P_aj P_bk]. It meets the keys on its way to the queries, the queries on its way to the keys.
    """
    p, overlap, turn, _ = _tables(body.pattern)
    keys, values, size = state.keys * turn, state.values, state.rows.size
    weight = outer * turn * _both(state.rows.slope, (1 + size * (1 - overlap)) * (1 - size * overlap))
    seen_values, seen_keys = values @ _transposed(p), keys @ _transposed(p)  # (groups, key, row)
    mixed_values = p @ seen_values
    cross = p @ (seen_values * seen_keys)
    centred = _sandwich(p, values * keys) - cross - _transposed(cross) + mixed_values * (p @ seen_keys)
    # Where keys share their weight with a key without a value, all their logits move that share as well.
    lost = outer * turn * _scaled_rows(1.0 - state.rows.kept, mixed_values)
    to_queries = (weight * centred + lost * (p @ seen_keys)).mean(axis=0)
    weight, lost = weight * state.keys, lost * state.keys
    pulled = weight @ p
    cross = (_transposed(pulled) * seen_values) @ p
    to_keys = (_transposed(p) @ pulled) * values - cross - _transposed(cross)
    to_keys = (to_keys + _transposed(p) @ (weight * mixed_values + lost) @ p).mean(axis=0)
    scale = body.scale**2 * body.d_head
    if not body.qk_norm:
        return scale * (body.key_gain * body.query_back * to_queries + body.query_gain * body.key_back * to_keys)
    to_queries = norm_backward(_UNIT, body.query_gain * state.kernel, to_queries)
    to_keys = norm_backward(_UNIT, body.key_gain * state.kernel, to_keys)
    return scale * (body.query_back * to_queries + body.key_back * to_keys)
