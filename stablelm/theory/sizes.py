"""Tokens of unequal sizes: what a finite width adds to a stream that no norm reads (derived here).

A token's mean square q has a relative variance s over tokens and draws, `unequal`: 2 / width in a Gaussian embedding,
and more with every random map. A norm takes that away; without one, a gated feed-forward, whose output goes with q^2
where the gate is nearly linear, is larger by up to 1 + s. A function f of q is taken at q (1 - sqrt(s)) and
q (1 + sqrt(s)), which is exact for a quadratic one; that needs s <= 1.
"""

import math

import numpy as np

from stablelm.theory.kernels import FeedForwardBody, feedforward_forward


def feedforward_of_unequal(body: FeedForwardBody, read: float, unequal: float) -> tuple[float, float]:
    """How much larger the output is than that of tokens of one size, `read`, and how unequal it is."""
    if unequal == 0:  # wherever a norm reads
        return 1.0, 0.0
    apart = math.sqrt(min(unequal, 1.0))
    small, alike, large = (_output(body, read * factor) for factor in (1 - apart, 1.0, 1 + apart))
    if alike == 0:
        return 1.0, 0.0
    return (small + large) / (2 * alike), ((large - small) / (large + small)) ** 2


def _output(body: FeedForwardBody, variance: float) -> float:
    return float(feedforward_forward(body, np.full((1, 1), variance))[0][0, 0])


def sum_of_unequal(share: float, stream: float, branch: float, draws: float, features: float) -> float:
    """How unequal a sum of a stream and a branch is, from how unequal each of them is, large where the other is.

    `share`: of the sum's variance that is the branch's; `draws`: relative variance of the branch's size between draws
    of its maps. The product of stream and branch over their `features` is independent between tokens.
    """
    apart = (1 - share) * math.sqrt(stream) + share * math.sqrt(branch)
    return apart**2 + draws * share**2 + 4 / features * share * (1 - share)
