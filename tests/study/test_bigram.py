"""The bigram model against a plain implementation, and as a distribution."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from support.studies import write_study
from support.tiny import TinyCorpus

from stablelm.data import validation
from stablelm.errors import DataError
from stablelm.study.baselines import bigram_losses
from stablelm.study.bigram import Bigram, training_pairs
from stablelm.study.cells import StudyTexts, cells_of
from stablelm.study.study_file import read_study


def plain(first: list[int], second: list[int], vocab: int):
    """p(b | a) with dictionaries, by the equations of the module."""
    pairs = Counter(zip(first, second, strict=True))
    seen, kinds, before = Counter(first), defaultdict(set), defaultdict(set)
    for a, b in pairs:
        kinds[a].add(b)
        before[b].add(a)

    def discount(counts: list[int]) -> float:
        once, twice = counts.count(1), counts.count(2)
        return once / (once + 2 * twice) if once else 0.5

    known = len(before)
    upper, total = discount(list(pairs.values())), len(pairs)
    lower = discount([len(each) for each in before.values()])

    def q(b: int) -> float:
        return max(len(before[b]) - lower, 0) / total + lower * known / total / vocab

    def p(a: int, b: int) -> float:
        if not seen[a]:
            return q(b)
        return max(pairs[a, b] - upper, 0) / seen[a] + upper * len(kinds[a]) / seen[a] * q(b)

    return p


@pytest.mark.parametrize("parts", [1, 3])
def test_the_model_is_that_of_the_equations(parts: int):
    draw, vocab = np.random.default_rng(0), 12
    text = np.minimum(draw.geometric(0.25, 400), vocab - 2)
    model = Bigram(vocab)
    for first, second in zip(np.array_split(text[:-1], parts), np.array_split(text[1:], parts), strict=True):
        model.count(first, second)
    p = plain(text[:-1].tolist(), text[1:].tolist(), vocab)
    a, b = draw.integers(0, vocab, 200), draw.integers(0, vocab, 200)
    wanted = -np.mean([math.log(p(int(x), int(y))) for x, y in zip(a, b, strict=True)])
    assert model.loss(a, b) == pytest.approx(wanted, rel=1e-12)
    for token in range(vocab):
        every = [math.exp(-model.loss(np.array([token]), np.array([other]))) for other in range(vocab)]
        assert sum(every) == pytest.approx(1, rel=1e-12) and min(every) > 0


def test_the_loss_of_a_study(tiny_corpus: TinyCorpus, tmp_path):
    study = read_study(str(write_study(tmp_path, tiny_corpus, budget={"tokens": 4096})))
    texts = StudyTexts()
    cells = cells_of(study, texts)
    found = bigram_losses(study, cells, pytest.fail)
    assert set(found) == {cell.name for cell in cells} and len(set(found.values())) == 1
    (loss,) = set(found.values())
    assert loss is not None and 1 < loss < math.log(300)
    assert bigram_losses(study, cells, pytest.fail) == found
    config = cells[0].config
    pairs = list(training_pairs(config, texts.sources(config.data), texts.tokenizer(config.data), 0))
    assert sum(len(first) for first, _ in pairs) == 4096


def test_a_text_that_cannot_be_read_is_named(tiny_corpus: TinyCorpus, tmp_path, monkeypatch: pytest.MonkeyPatch):
    study = read_study(str(write_study(tmp_path, tiny_corpus, budget={"tokens": 4096})))
    cells = cells_of(study, StudyTexts())

    def unreadable(*_: object, **__: object):
        raise DataError("gone.json.gz cannot be read")

    monkeypatch.setattr(validation, "read", unreadable)
    messages: list[str] = []
    assert set(bigram_losses(study, cells, messages.append).values()) == {None}
    assert len(messages) == len(cells)
    assert all(cell.name in said and "gone.json.gz" in said for cell, said in zip(cells, messages, strict=True))
