"""Attention over sequences in which tokens repeat, predicted and drawn at random."""

import numpy as np
import pytest
import torch
from simulated_stack import Draw, attend

from stablelm.theory.attention import AttentionBody, Pattern, attention_forward, causal_pattern
from stablelm.theory.repeats import Repeats, token_correlation

SEQ_LEN, HEADS, D_HEAD, TYPES, BATCH = 32, 8, 16, 12, 24
WIDTH = HEADS * D_HEAD


def make_body(pattern: Pattern, gain: float) -> AttentionBody:
    forward, back = (gain, gain, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)
    return AttentionBody(pattern, *forward, *back, scale=D_HEAD**-0.5, d_head=D_HEAD)


def measured(body: AttentionBody, seed: int) -> tuple[np.ndarray, float, float]:
    """(mean kernel, share of pairs with the same token, correlation of these in the output) of one draw of weights."""
    draw = Draw(seed)
    tokens = torch.randint(TYPES, (BATCH, SEQ_LEN), generator=draw.generator)
    x = draw.matrix(WIDTH, TYPES, WIDTH).t()[tokens]
    out, _, _ = attend(body, (x, x, x), heads=HEADS, d_out=WIDTH, draw=draw)
    kernels = (out @ out.transpose(1, 2) / WIDTH).double()
    off = ~torch.eye(SEQ_LEN, dtype=torch.bool)
    same = (tokens[:, :, None] == tokens[:, None, :]) & off
    std = kernels.diagonal(dim1=1, dim2=2).sqrt()
    cosines = kernels / (std[:, :, None] * std[:, None, :])
    return kernels.mean(dim=0).numpy(), same[:, off].double().mean().item(), cosines[same].mean().item()


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("rotary", [None, 100.0 ** (-np.arange(D_HEAD // 2) / (D_HEAD // 2))])
def test_repeated_tokens_are_drawn_together(gain, rotary):
    pattern = causal_pattern(SEQ_LEN) if rotary is None else Pattern(causal_pattern(SEQ_LEN).log_weights, rotary=rotary)
    body, draws = make_body(pattern, gain), [measured(make_body(pattern, gain), seed) for seed in range(12)]
    found, share = np.mean([draw[0] for draw in draws], axis=0), float(np.mean([draw[1] for draw in draws]))
    kernel = np.full((SEQ_LEN, SEQ_LEN), share)
    np.fill_diagonal(kernel, 1.0)
    with_repeats, _, state = attention_forward(body, kernel, None, Repeats(share, 1.0, 1.0))
    without, _, _ = attention_forward(body, kernel, None)
    variance = np.diagonal(found).mean()
    assert np.diagonal(with_repeats).mean() == pytest.approx(variance, rel=0.05)
    assert token_correlation(with_repeats) == pytest.approx(token_correlation(found), abs=0.04)
    assert state.repeated == pytest.approx(np.mean([draw[2] for draw in draws]), abs=0.08)
    if gain >= 1:
        assert np.diagonal(without).mean() < 0.95 * variance


def test_no_pair_repeats_leaves_all_as_it_was():
    body, kernel = make_body(causal_pattern(SEQ_LEN), 1.0), np.full((SEQ_LEN, SEQ_LEN), 0.3) + 0.7 * np.eye(SEQ_LEN)
    plain, entropy, _ = attention_forward(body, kernel, None)
    told, entropy_told, _ = attention_forward(body, kernel, None, Repeats(0.0, 1.0, 1.0))
    np.testing.assert_allclose(told, plain, rtol=1e-12)
    assert entropy_told == pytest.approx(entropy, rel=1e-12)


def test_pairs_that_are_as_alike_as_all_others_change_nothing():
    body, kernel = make_body(causal_pattern(SEQ_LEN), 1.0), np.full((SEQ_LEN, SEQ_LEN), 0.3) + 0.7 * np.eye(SEQ_LEN)
    plain, _, _ = attention_forward(body, kernel, None)
    told, _, _ = attention_forward(body, kernel, None, Repeats(0.05, 0.3, 0.3))
    np.testing.assert_allclose(told, plain, rtol=1e-12)
