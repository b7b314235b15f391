"""Shares of each stream against a direct perturbation of stacks of linear branches."""

import numpy as np
import pytest

from stablelm.theory import sensitivity as theory

WIDTH, TOKENS, SEEDS, P = 128, 64, 6, 1e-3
MATRICES = 2


def unit(x):
    """Root-mean-square normalisation of each row."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True))


def run(join, x, branches, normalise_sum=False):
    """Apply each branch, a product of matrices on the normalised stream, and join it to the stream."""
    for matrices in branches:
        f = unit(x)
        for matrix in matrices:
            f = f @ matrix
        x = join(x, f)
        x = unit(x) if normalise_sum else x
    return x


def draw(rng, n_branches, growth, concat):
    """Two matrices a branch, with fan-in stds; the input widens by `growth` a branch where streams concatenate."""
    widths = [WIDTH + growth * i * concat for i in range(n_branches)]
    return [[rng.normal(0, w**-0.5, (w, WIDTH)), rng.normal(0, WIDTH**-0.5, (WIDTH, growth))] for w in widths]


def measured_sensitivity(join, n_branches, growth=WIDTH, concat=False, normalise_sum=False):
    """Mean over seeds of p^-2 E||change||^2 / E||output||^2."""
    results = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((TOKENS, WIDTH))
        branches, other = (draw(rng, n_branches, growth, concat) for _ in range(2))
        moved = [
            [w + P * v for w, v in zip(pair, noise, strict=True)] for pair, noise in zip(branches, other, strict=True)
        ]
        before, after = (run(join, x, each, normalise_sum) for each in (branches, moved))
        results.append(((after - before) ** 2).sum() / (before**2).sum() / P**2)
    return np.mean(results)


def residual(x, f):
    return x + f


def concat(x, f):
    return np.concatenate([x, f], axis=-1)


@pytest.mark.parametrize("n_branches", [8, 32])
def test_pre_ln(n_branches):
    predicted = theory.sensitivity(theory.residual_shares(np.ones(n_branches)), MATRICES)
    assert predicted == pytest.approx({8: 3.66, 32: 6.18}[n_branches], abs=0.005)
    assert measured_sensitivity(residual, n_branches) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("n_branches", [8, 16, 32])
def test_post_ln(n_branches):
    predicted = theory.sensitivity(theory.post_shares(np.ones(n_branches)), MATRICES)
    assert predicted == n_branches
    assert measured_sensitivity(residual, n_branches, normalise_sum=True) == pytest.approx(predicted, rel=0.15)


def test_deepnorm():
    alpha, beta = 32**0.25, 128**-0.25
    predicted = theory.sensitivity(theory.deepnorm_shares(np.ones(32), alpha, beta), MATRICES)
    assert predicted == pytest.approx(0.0883, abs=1e-4)
    measured = measured_sensitivity(lambda x, f: alpha * x + beta**2 * f, 32, normalise_sum=True)
    assert measured == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize(("n_branches", "stated"), [(8, 0.68), (32, 9.67)])
def test_constant_gate(n_branches, stated):
    z = 0.119
    predicted = theory.sensitivity(theory.gated_shares(np.ones(n_branches), z), MATRICES)
    assert predicted == pytest.approx(stated, abs=0.01)
    assert measured_sensitivity(lambda x, f: (1 - z) * x + z * f, n_branches) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize(("growth", "stated"), [(WIDTH, 6.18), (WIDTH // 4, 4.18), (WIDTH // 8, 3.12)])
def test_concatenation(growth, stated):
    predicted = theory.catformer_sensitivity(32, WIDTH, growth, MATRICES)
    assert predicted == pytest.approx(stated, abs=0.01)
    assert measured_sensitivity(concat, 32, growth, concat=True) == pytest.approx(predicted, rel=0.15)


def test_depth_scaled_stream_with_weak_branches():
    skip, gain, variance = np.sqrt(1 - 2 / 12), np.sqrt(2 / 12), 0.5
    predicted = theory.sensitivity(theory.scaled_shares(np.full(24, variance), skip, gain), MATRICES)
    measured = measured_sensitivity(lambda x, f: skip * x + gain * np.sqrt(variance) * f, 24)
    assert measured == pytest.approx(predicted, rel=0.15)


def test_order_of_the_streams():
    ones = np.ones(32)
    cat = theory.catformer_sensitivity(32, WIDTH, WIDTH // 4, MATRICES)
    pre = theory.sensitivity(theory.residual_shares(ones), MATRICES)
    post = theory.sensitivity(theory.post_shares(ones), MATRICES)
    assert cat < pre < post
    cat, pre, post = (
        measured_sensitivity(concat, 32, WIDTH // 4, concat=True),
        measured_sensitivity(residual, 32),
        measured_sensitivity(residual, 32, normalise_sum=True),
    )
    assert cat < pre < post


def test_special_cases_agree():
    v = np.array([0.2, 1.0, 0.7, 2.0])
    assert theory.scaled_shares(v, 1, 1, 1.5) == pytest.approx(theory.residual_shares(v, 1.5))
    plain, same = [False] * len(v), [(0.9, 0.3)] * len(v)
    assert theory.joined_shares(v, same, plain, 1.5) == pytest.approx(theory.scaled_shares(v, 0.9, 0.3, 1.5))
    normed = [True] * len(v)
    assert theory.joined_shares(v, [(0.9, 1.0)] * len(v), normed) == pytest.approx(theory.post_shares(v, 0.9))
    assert theory.gated_shares(v, 0.3) == pytest.approx(theory.scaled_shares(v, 0.7, 0.3))
    assert theory.deepnorm_shares(v, 1, 1) == pytest.approx(theory.post_shares(v))
    assert theory.concat_shares(v, 64, 64, 1.5) == pytest.approx(theory.residual_shares(v, 1.5))
    assert theory.sensitivity([0.5, 0.25], np.array([4, 2])) == 2.5
