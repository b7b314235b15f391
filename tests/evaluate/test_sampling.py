"""The sampler against transformers' own processors, and what must hold for any logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablelm.errors import ConfigError
from stablelm.evaluate.generation.next_token import choose, probabilities
from stablelm.evaluate.generation.sampling import Sampling, uniforms

VOCABULARY = 24
numbers = st.lists(
    st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY), min_size=1, max_size=3
).map(torch.tensor)
settings_of = st.builds(
    Sampling,
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.01, 1),
    repetition_penalty=st.floats(0.5, 3),
)


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_several_samples_need_chance():
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        sampling.check_samples(1)
        with pytest.raises(ConfigError, match=r"^samples=3 texts of a prompt are equal with (temperature=0|top_k=1)"):
            sampling.check_samples(3)
    Sampling(temperature=0.1, top_k=2).check_samples(3)


def seen_in(tokens: Tensor) -> Tensor:
    seen = torch.zeros(len(tokens), VOCABULARY, dtype=torch.bool)
    return seen.scatter(1, tokens, True)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(top_p=0.05),
        Sampling(repetition_penalty=1.4),
        Sampling(temperature=1.3, top_k=9, top_p=0.9, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(sampling: Sampling):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(50).double()
    tokens = torch.randint(VOCABULARY, (50, 6), generator=torch.Generator().manual_seed(1))
    scores = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(tokens, logits.clone())
    scores = transformers.TemperatureLogitsWarper(sampling.temperature)(tokens, scores)
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(tokens, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(tokens, scores)
    torch.testing.assert_close(probabilities(logits, sampling, seen_in(tokens)), scores.softmax(dim=-1))


@settings(max_examples=200, deadline=None)
@given(numbers, settings_of, st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))
def test_a_token_is_always_left_and_drawn_from_those_left(logits: Tensor, sampling: Sampling, drawn: list[float]):
    seen = seen_in(torch.arange(4).expand(len(logits), 4))
    shares = probabilities(logits, sampling, seen)
    assert torch.allclose(shares.sum(dim=-1), torch.ones(len(logits), dtype=torch.float64))
    kept = (shares > 0).sum(dim=-1)
    assert (kept >= 1).all()
    tokens = choose(logits, sampling, drawn[: len(logits)], seen)
    assert all(shares[row, token] > 0 for row, token in enumerate(tokens))


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(logits: Tensor, top_p: float):
    whole = logits.double().softmax(dim=-1)
    kept = probabilities(logits, Sampling(top_p=top_p)) > 0
    for row, chosen in zip(whole, kept, strict=True):
        assert row[chosen].sum() >= top_p - 1e-9
        assert row[chosen].sum() - row[chosen].min() < top_p + 1e-9
        if not chosen.all():
            assert row[chosen].min() >= row[~chosen].max()


def test_draws_have_the_probabilities():
    logits, sampling = random_logits(1, 3), Sampling(top_k=6, temperature=1.5)
    generator = uniforms(0, [1, 2, 3], 0)
    count = 20_000
    tokens = choose(logits.expand(count, -1), sampling, [generator.random() for _ in range(count)])
    found = np.bincount(tokens, minlength=VOCABULARY) / count
    wanted = probabilities(logits, sampling)[0].numpy()
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / count)


def test_draws_are_one_cut_of_the_unit_interval():
    """Each token has an interval as long as its share; the ends belong to tokens with a share."""
    logits = torch.tensor([[0.0, -torch.inf, np.log(3.0), -torch.inf]])
    for drawn, token in ((0.0, 0), (0.2499, 0), (0.2501, 2), (1 - 1e-16, 2)):
        assert choose(logits, Sampling(), [drawn]) == [token]


def test_temperature_zero_is_the_likeliest_after_the_penalty():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    greedy = Sampling(temperature=0, repetition_penalty=1.2)
    assert choose(logits, greedy, [0.5], torch.tensor([[False, False, False]])) == [0]
    assert choose(logits, greedy, [0.5], torch.tensor([[True, False, False]])) == [1]


def test_seeds_depend_on_prompt_number_and_seed():
    first = [uniforms(*key).random() for key in ((0, [1, 2], 0), (0, [1, 2], 0), (1, [1, 2], 0), (0, [1, 2], 1))]
    assert first[0] == first[1]
    assert len({*first, uniforms(0, [12], 0).random()}) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"stop": ("",)}, "must be strings that are not empty"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict, words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Sampling(**values)
