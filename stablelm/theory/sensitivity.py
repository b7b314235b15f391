"""Sensitivity of the last activation to relative weight changes, for each way of joining branches to the stream.

Davis et al. (Catformer, ICML 2021) define sensitivity: perturb every weight by an independent copy of itself of
relative size p; S = lim p^-2 E||change||^2 / E||activation||^2. If a branch is a product of s matrices on a
normalised input and uncorrelated with the stream, then S grows by s * share at each branch, where share is the
part of the stream's variance which that branch contributed. The share formulas are derived here.
A branch's variance is its own, as measured or predicted; an attention branch is weaker than 1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def residual_shares(branch_variances: ArrayLike, embedding_variance: float = 1.0) -> Array:
    """x + f: v_l / (v_0 + v_1 + .. + v_l) for each branch l; unit variances give 1 / (l + 1)."""
    v = np.asarray(branch_variances, dtype=np.float64)
    return v / (embedding_variance + np.cumsum(v))


def scaled_shares(branch_variances: ArrayLike, skip: float, gain: float, embedding_variance: float = 1.0) -> Array:
    """skip x + gain f: gain^2 v_l / X_l with X_l = skip^2 X_(l-1) + gain^2 v_l and X_0 the embedding variance."""
    total, result = embedding_variance, []
    for contribution in gain**2 * np.asarray(branch_variances, dtype=np.float64):
        total = skip**2 * total + contribution
        result.append(contribution / total)
    return np.asarray(result, dtype=np.float64)


def gated_shares(branch_variances: ArrayLike, gate: float, embedding_variance: float = 1.0) -> Array:
    """(1 - z) x + z f with a constant gate z, as a GRU gate (GTrXL, Parisotto et al. 2020) at initialisation."""
    return scaled_shares(branch_variances, 1 - gate, gate, embedding_variance)


def post_shares(branch_variances: ArrayLike, skip: float = 1.0) -> Array:
    """norm(skip x + f), the stream at unit variance: v_l / (skip^2 + v_l); 1/2 for Post-LN at unit variances."""
    v = np.asarray(branch_variances, dtype=np.float64)
    return v / (skip**2 + v)


def joined_shares(
    branch_variances: ArrayLike,
    gains: Sequence[tuple[float, float]],
    normed: Sequence[bool],
    embedding_variance: float = 1.0,
) -> Array:
    """As `scaled_shares` with a skip and a gain for each branch; where `normed`, the stream has unit variance after."""
    total, result = embedding_variance, []
    for variance, (skip, gain), after in zip(np.asarray(branch_variances, np.float64), gains, normed, strict=True):
        total = skip**2 * total + gain**2 * variance
        result.append(gain**2 * variance / total)
        total = 1.0 if after else total
    return np.asarray(result, dtype=np.float64)


def deepnorm_shares(branch_variances: ArrayLike, alpha: float, beta: float) -> Array:
    """DeepNorm (Wang et al. 2022): skip alpha, and two matrices of each branch scaled by beta.

    `branch_variances` are those before the scaling, so a share is beta^4 v / (alpha^2 + beta^4 v).
    """
    return post_shares(beta**4 * np.asarray(branch_variances, dtype=np.float64), alpha)


def concat_shares(
    branch_variances: ArrayLike, d_model: int, growth: float | Array, embedding_variance: float = 1.0
) -> Array:
    """Concatenation (Catformer): each branch adds `growth` channels to an embedding of d_model channels.

    g v_l / (d_model v_0 + g (v_1 + .. + v_l)); unit variances give g / (d_model + l g).
    """
    energy = np.asarray(branch_variances, dtype=np.float64) * growth
    return energy / (d_model * embedding_variance + np.cumsum(energy))


def sensitivity(shares: ArrayLike, matrices_per_branch: float | Array) -> float:
    """Sum over the branches of matrices_per_branch * share, one number or one for each branch."""
    return float(np.sum(np.asarray(shares, dtype=np.float64) * matrices_per_branch))


def catformer_sensitivity(n_sublayers: int, d_model: int, growth: int, matrices: float) -> float:
    """Sensitivity of a concatenated stream of unit variance: matrices * sum_l g / (d_model + l g)."""
    return sensitivity(concat_shares(np.ones(n_sublayers), d_model, growth), matrices)
