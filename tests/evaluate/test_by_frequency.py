"""The loss of frequent and rare tokens apart: every third of the targets, and the mean of all."""

import pytest
import torch

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.data.validation import ValidationSet
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.evaluate.perplexity import evaluate, thirds
from stablelm.model.targets import IGNORED

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)


def test_thirds_of_the_targets_by_frequency():
    targets = torch.tensor([[5, 5, 5, 5, IGNORED, 2, 2], [2, 7, 7, 1, 3, 0, IGNORED]])
    found = thirds(targets)
    # 4 x 5, 3 x 2, 2 x 7 and three single ones: 12 targets.
    assert {token: int(found[token]) for token in (5, 2, 7, 0, 1, 3)} == {5: 0, 2: 1, 7: 1, 0: 2, 1: 2, 3: 2}


def test_one_token_alone_is_the_head():
    assert thirds(torch.full((2, 3), 4))[4] == 0
    assert thirds(torch.full((2, 3), IGNORED)).numel() == 0


def test_losses_by_third():
    tiny = ["model.n_layers=2", "model.d_model=32", "model.n_heads=4", "train.steps=5", "data.seq_len=12"]
    config = resolve(
        load([], [*tiny, "train.precision=fp64"]).config, pieces=90, world_size=1, accelerate_precision=None
    )
    engine = TorchEngine(config, "single", SINGLE, train=False)
    rows = (90 * torch.rand(5, 13, generator=torch.Generator().manual_seed(1)) ** 3).long()
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[4, 6:] = IGNORED
    found = evaluate(engine, SINGLE, ValidationSet(tokens, targets, None, 5), 2)
    with torch.no_grad():
        hidden = engine.module(tokens)
        assert isinstance(hidden, torch.Tensor)
        log = engine.module.logits(hidden).log_softmax(-1)
    valid = targets != IGNORED
    losses = -log.gather(2, targets.clamp(min=0)[..., None])[..., 0][valid]
    place = thirds(targets)[targets[valid]]
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-12)
    for index, name in enumerate(("head", "middle", "tail")):
        assert found.by_frequency[name] == pytest.approx(float(losses[place == index].mean()), rel=1e-12)
    counts = torch.bincount(place)
    mean = sum(float(n) * loss for n, loss in zip(counts, found.by_frequency.values(), strict=True)) / int(counts.sum())
    assert mean == pytest.approx(found.loss, rel=1e-12)


def test_the_losses_of_targets_are_kept_without_gradients_alone():
    from stablelm.model.loss import chunked_cross_entropy

    hidden = torch.randn(6, 4, requires_grad=True)
    weight, targets = torch.randn(9, 4), torch.tensor([1, 2, IGNORED, 4, 5, 8])
    assert chunked_cross_entropy(hidden, weight, targets).each.numel() == 0
    with torch.no_grad():
        sums = chunked_cross_entropy(hidden, weight, targets)
    assert sums.each.shape == (6,)
    assert float(sums.each[2]) == 0
    assert float(sums.each.sum()) == pytest.approx(float(sums.cross_entropy), rel=1e-6)
