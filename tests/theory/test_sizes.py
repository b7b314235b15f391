"""Tokens of unequal sizes in a narrow stream without norms, against simulated draws."""

from dataclasses import replace

import numpy as np
import pytest

from stablelm.theory.attention import AttentionBody, causal_pattern
from stablelm.theory.kernels import FeedForwardBody
from stablelm.theory.moments import SILU
from stablelm.theory.propagation import End, SublayerTheory, propagate

LAYERS, WIDTH, HIDDEN, TOKENS, DRAWS, START = 12, 64, 128, 8, 300, 0.3
GAIN = 0.5**0.5  # of the skip and of the branch


def measured() -> tuple[np.ndarray, np.ndarray]:
    """Stream and feed-forward branch variances by layer, means over draws: each token's own value, then SwiGLU."""
    generator = np.random.default_rng(0)

    def drawn(d_in: int, d_out: int) -> np.ndarray:
        return generator.normal(0, d_in**-0.5, (DRAWS, d_in, d_out))

    x, streams, branches = START**0.5 * generator.normal(size=(DRAWS, TOKENS, WIDTH)), [], []
    for _ in range(LAYERS):
        x = GAIN * (x + x @ drawn(WIDTH, WIDTH) @ drawn(WIDTH, WIDTH))
        gate = x @ drawn(WIDTH, HIDDEN)
        branch = (gate / (1 + np.exp(-gate)) * (x @ drawn(WIDTH, HIDDEN))) @ drawn(HIDDEN, WIDTH)
        x = GAIN * (x + branch)
        streams.append((x**2).mean())
        branches.append((branch**2).mean())
    return np.array(streams), np.array(branches)


def sublayers() -> list[SublayerTheory]:
    gains = dict.fromkeys(("value_gain", "output_gain", "query_back", "key_back", "value_back", "output_back"), 1.0)
    attention = AttentionBody(
        causal_pattern(TOKENS), query_gain=0.0, key_gain=0.0, scale=WIDTH**-0.5, d_head=WIDTH, centred=True,
        draw_variance=4 / WIDTH, **gains,
    )  # fmt: skip
    feedforward = FeedForwardBody(SILU, 1.0, 1.0, HIDDEN / WIDTH, WIDTH / HIDDEN, 1.0, HIDDEN / WIDTH, gated=True)
    return [
        SublayerTheory(body, GAIN, GAIN, features=WIDTH) for _ in range(LAYERS) for body in (attention, feedforward)
    ]


def test_gated_branches_grow_with_the_spread_of_tokens_sizes():
    end, kernel = End(None, 1.0, 0.0, TOKENS), START * np.eye(TOKENS) + 1e-9
    narrow = propagate(kernel, sublayers(), end, unequal=2 / WIDTH)
    wide = propagate(kernel, [replace(each, features=np.inf) for each in sublayers()], end)
    streams, branches = measured()
    assert narrow.stream_variance[1:] == pytest.approx(streams, rel=0.05)
    assert narrow.feedforward_branch_variance[1:] == pytest.approx(branches, rel=0.2)
    # For tokens of one size, as at an infinite width, they come out smaller.
    assert wide.feedforward_branch_variance[-3:].mean() < 0.75 * branches[-3:].mean()
