"""The verdict: measured ratios, our runs' range if there is one, and no prophecy."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from stablelm.observe.layer_hooks import Internals
from stablelm.probe import verdict as module
from stablelm.probe.predict import Prediction
from stablelm.probe.verdict import Run, number, read_runs, verdict

RUNS = [Run("a", 1.2, True), Run("b", 230.0, True), Run("c", 1200.0, False), Run("d", 8e5, False)]


def figures(**columns: list[float]) -> Internals:
    return Internals(**{field.name: np.array(columns.get(field.name, [1.0, 1.0, 1.0])) for field in fields(Internals)})


def reference() -> Prediction:
    columns = {field.name: np.ones(3) for field in fields(Prediction)}
    columns |= {"gradient_norm": np.array([9.0, 1.4, 1.0]), "stream_variance": np.array([1.0, 1.0, 1.1])}
    return Prediction(**{**columns, "token_correlation": np.array([0.0, 0.2, 0.61])})


def test_measured_ratios():
    found = figures(
        gradient_norm=[7.0, 1e-4, 3.1], stream_variance=[0.5, 1.0, 6.0], token_correlation=[0.02, 0.5, 0.97]
    )
    words = verdict(found, reference(), [], "fp32")
    assert "falls by a factor of 3.1e4 from the top to the bottom of the stack (layer 2 to layer 1)" in words
    assert "variance grows by a factor of 12 (0.50 after the embedding, 6.0 at the end)" in words
    assert "cosine of 0.02 and end with 0.97" in words
    assert "deepscalelm_pre at this shape the theory has a gradient factor of 1.4, a growth of 1.1" in words
    assert "runs" not in words


@pytest.mark.parametrize(("ratio", "place"), [(2.0, "inside"), (0.5, "inside"), (400.0, "outside"), (1e-5, "outside")])
def test_our_runs_are_quoted_and_nothing_is_foretold(ratio: float, place: str):
    words = verdict(figures(gradient_norm=[1.0, ratio, 1.0]), None, RUNS, "fp32")
    assert "that factor was 1.2 to 230 in the models that trained and 1.2e3 to 8.0e5 in those that did not" in words
    assert f"here it lies {place} the range that trained" in words
    assert "deepscalelm_pre" not in words
    for prophecy in ("will", "cannot train", "fail", "diverge"):
        assert prophecy not in words


def test_a_steady_model_keeps_its_size():
    words = verdict(figures(gradient_norm=[1.0, 1.02, 1.0]), None, [], "fp32")
    assert words.count("keeps its size") == 2


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"stream_variance": [1.0, np.inf, np.nan]}, "The stream is not finite in fp32 from layer 1 of 2 on."),
        ({"gradient_norm": [0.0, 0.0, 1.0]}, "The gradient is zero or not finite in fp32 from layer 1 of 2 down."),
    ],
)
def test_what_leaves_the_range_of_numbers(columns: dict, sentence: str):
    assert verdict(figures(**columns), None, RUNS, "fp32") == sentence


def test_the_runs_are_read_from_the_package_and_may_be_missing(tmp_path: Path):
    path = tmp_path / "trainability.json"
    assert read_runs(path) == []
    path.write_text(json.dumps([{"method": "post_ln", "gradient_ratio": 1e-3, "trained": False}]))
    assert read_runs(path) == [Run("post_ln", 1e3, False)]
    assert module.TRAINABILITY.parent.name == "probe"
    for run in read_runs():
        assert run.gradient_ratio >= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.0"), (31.4, "31"), (314.0, "310"), (3.14e4, "3.1e4"), (0.0012, "1.2e-3"), (99.9, "100")],
)
def test_numbers_have_two_digits(value: float, text: str):
    assert number(value) == text
