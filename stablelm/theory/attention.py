"""Causal softmax attention on token kernels, forward and backward (derived here; checked against simulation).

With p the attention weights that fixed biases alone give, and P those with random logits, everything rests on
E[P_aj P_bk] = p_aj p_bk h_ab (1 + delta_jk e_ab): all keys are alike, and two rows a and b favour the same ones as far
as their queries are alike. 1 + e_ab = exp(g_ab), where g_ab is the covariance of the two rows' logits about their row
means, damped as the exact fluctuations of one row demand (`theory.rows`); rows sum to one, so
h_ab = 1 / (1 + e_ab sum_j p_aj p_bj).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stablelm.theory.kernels import Norm, norm_backward, norm_forward
from stablelm.theory.moments import dyt_second_moment, dyt_slope
from stablelm.theory.rows import row_fluctuations

Array = NDArray[np.float64]


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


def causal_pattern(seq_len: int, rotary: Array | None = None) -> Pattern:
    """No biases: each query looks at all keys up to its own position."""
    return Pattern(np.where(np.tri(seq_len, dtype=bool), 0.0, -np.inf)[None], rotary=rotary)


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
    2025); None: off. `dropout` is that of the attention weights.
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
    inner_norm: Norm | None = None
    value_mix: float | None = None
    dropout: float = 0.0


class _Tables(NamedTuple):
    """Of a pattern, (groups, T, T) but for `turn`: p; sum_j p_aj p_bj; mean cosine of the angle between positions
    a and b, (T, T) or 1; and of that between keys, weighted with p_aj p_bk over j != k, or 1."""

    p: Array
    overlap: Array
    turn: Array | float
    turn_keys: Array | float


class AttentionState(NamedTuple):
    """What the backward pass needs: input kernel, its queries' and keys' (T, T); the values' and the heads' output;
    e_ab and h_ab (groups, T, T); and (groups, T) slopes of the softmax about the mean-field ones, with the cap's."""

    keys: Array
    values: Array
    mixed: Array
    excess: Array
    share: Array
    slope: Array


@lru_cache(maxsize=8)
def _tables(pattern: Pattern) -> _Tables:
    weights = np.exp(pattern.log_weights - pattern.log_weights.max(axis=-1, keepdims=True))
    p = weights / weights.sum(axis=-1, keepdims=True)
    overlap = p @ np.swapaxes(p, 1, 2)
    if pattern.rotary is None:
        return _Tables(p, overlap, 1.0, 1.0)
    place = np.arange(p.shape[-1], dtype=np.float64)
    phase = np.exp(1j * place[:, None] * pattern.rotary)  # (T, d_head / 2)
    turn = (phase @ phase.conj().T).real / pattern.rotary.size
    mean = (p @ phase) * phase.conj()
    both = (mean @ np.swapaxes(mean, 1, 2).conj()).real / pattern.rotary.size
    return _Tables(p, overlap, turn, _off_diagonal(both, overlap * turn, overlap, default=1.0))


def _off_diagonal(whole: Array, diagonal: Array, overlap: Array, default: float = 0.0) -> Array:
    """Mean over j != k under p_aj p_bk, from the mean over all j, k and the share of j = k; rows with one key: default."""
    rest = 1 - overlap
    return np.where(rest > 1e-9, (whole - diagonal) / np.maximum(rest, 1e-9), default)


def _sandwich(p: Array, kernel: Array) -> Array:
    """sum_jk p_aj K_jk p_bk."""
    return p @ kernel @ np.swapaxes(p, 1, 2)


def _shared(p: Array, kernel: Array) -> Array:
    """sum_j p_aj K_jj p_bj."""
    return (p * np.diagonal(kernel)) @ np.swapaxes(p, 1, 2)


def _logit_gain(body: AttentionBody) -> float:
    """Variance of a logit over the product of query's and key's kernel (unit ones under qk_norm)."""
    gains = 1.0 if body.qk_norm else body.query_gain * body.key_gain
    return body.scale**2 * body.d_head * gains


def _unit(kernel: Array) -> Array:
    return norm_forward(Norm("rmsnorm"), kernel)


def attention_forward(body: AttentionBody, kernel: Array, first: Array | None) -> tuple[Array, float, AttentionState]:
    """Kernel of the body's output, mean entropy of its rows in nats, and the state for the backward pass.

    `kernel`: (T, T), of the body's input; `first`: values' kernel of the first attention body, None for itself.
    """
    p, overlap, turn, turn_keys = _tables(body.pattern)
    keys = _unit(kernel) if body.qk_norm else kernel
    own = body.value_gain * kernel
    mix = body.value_mix if first is not None and body.value_mix else 0.0
    values = own if not mix else (1 - mix) ** 2 * own + mix**2 * first

    same = _shared(p, keys)
    apart = _off_diagonal(_sandwich(p, keys), same, overlap)
    alike = np.divide(same, overlap, out=np.zeros_like(same), where=overlap > 0)
    covariance = _logit_gain(body) * keys * (turn * alike - turn_keys * apart)
    kept, cap_slope = _cap(body, keys, p)
    covariance = covariance * np.sqrt(kept[:, :, None] * kept[:, None, :])
    spread = np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0.0)  # (groups, T)
    keys_seen = 1 / np.diagonal(overlap, axis1=1, axis2=2)
    rows = row_fluctuations(spread, keys_seen)
    damping = np.sqrt(np.divide(rows.growth, spread, out=np.zeros_like(spread), where=spread > 0))
    excess = np.expm1(np.clip(covariance * damping[:, :, None] * damping[:, None, :], -50.0, 50.0))
    share = 1 / (1 + excess * overlap)

    shared = _shared(p, values)
    mixed = share * (_sandwich(p, values) + excess * shared)
    if body.dropout:
        own_row = np.einsum("gaa->ga", share * (1 + excess) * shared)
        np.einsum("gaa->ga", mixed)[...] += body.dropout / (1 - body.dropout) * own_row
    mixed = mixed.mean(axis=0)
    if body.pattern.row_scale is not None:
        mixed = mixed * np.outer(body.pattern.row_scale, body.pattern.row_scale)
    fixed = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    entropy = float(np.maximum(fixed - np.where(keys_seen > 1 + 1e-9, rows.entropy_loss, 0.0), 0.0).mean())
    state = AttentionState(keys, values, mixed, excess, share, np.sqrt(rows.slope_share * cap_slope))
    return body.output_gain * norm_forward(body.inner_norm, mixed), entropy, state
