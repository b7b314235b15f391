"""The figures in words: measured ratios beside those of our own trainability runs; no prediction of failure."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stablelm.observe.layer_hooks import Internals
from stablelm.probe.predict import Prediction

TRAINABILITY = Path(__file__).with_name("trainability.json")
REFERENCE = "deepscalelm_pre"
STEADY = 1.05


@dataclass(frozen=True)
class Run:
    """A trainability run of ours: `gradient_ratio` as measured here at its start, and whether it then trained."""

    method: str
    gradient_ratio: float
    trained: bool


def read_runs(path: Path = TRAINABILITY) -> list[Run]:
    """The runs in the package's file; none if the file does not exist."""
    if not path.exists():
        return []
    return [
        Run(item["method"], factor(item["gradient_ratio"]), item["trained"]) for item in json.loads(path.read_text())
    ]


def factor(ratio: float) -> float:
    """A ratio as a factor of at least 1, whichever end is larger."""
    return max(ratio, 1 / ratio) if ratio > 0 else np.inf


def verdict(found: Internals, reference: Prediction | None, runs: list[Run], precision: str) -> str:
    """Sentences on the gradient over depth, the stream's growth and the tokens' correlation.

    `reference`: the prediction for `REFERENCE` at the same shape, None where the model is just that.
    """
    sentences = _not_finite(found, precision)
    if not sentences:
        sentences = [_gradient(found.gradient_norm, runs), _stream(found), _tokens(found)]
    if reference is not None:
        ends = reference.gradient_norm[1], reference.gradient_norm[-1]
        growth = reference.stream_variance[-1] / reference.stream_variance[0]
        sentences.append(
            f"For {REFERENCE} at this shape the theory has a gradient factor of {number(factor(ends[0] / ends[1]))}, "
            f"a growth of {number(growth)} and a cosine of {reference.token_correlation[-1]:.2f}."
        )
    return " ".join(sentences)


def _not_finite(found: Internals, precision: str) -> list[str]:
    """One sentence for each figure that leaves the range of numbers, the first depth at which it does."""
    bad_stream = np.flatnonzero(~np.isfinite(found.stream_variance))
    bad_gradient = np.flatnonzero(~np.isfinite(found.gradient_norm) | (found.gradient_norm == 0))
    if bad_stream.size:
        return [f"The stream is not finite in {precision} from layer {bad_stream[0]} of {_last(found)} on."]
    if bad_gradient.size:
        return [
            f"The gradient is zero or not finite in {precision} from layer {bad_gradient[-1]} of {_last(found)} down."
        ]
    return []


def _last(found: Internals) -> int:
    return len(found.stream_variance) - 1


def _gradient(norms: np.ndarray, runs: list[Run]) -> str:
    ratio = norms[1] / norms[-1]
    words = (
        f"The gradient {_change(ratio)} from the top to the bottom of the stack (layer {len(norms) - 1} to layer 1)."
    )
    trained = [run.gradient_ratio for run in runs if run.trained]
    others = [run.gradient_ratio for run in runs if not run.trained]
    if not trained:
        return words
    place = "inside" if min(trained) <= factor(ratio) <= max(trained) else "outside"
    words += f" In our own trainability runs that factor was {_range(trained)} in the models that trained"
    words += f" and {_range(others)} in those that did not" if others else ""
    return f"{words}; here it lies {place} the range that trained."


def _change(ratio: float) -> str:
    if factor(ratio) < STEADY:
        return "keeps its size"
    return f"{'falls' if ratio < 1 else 'grows'} by a factor of {number(factor(ratio))}"


def _range(values: list[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


def _stream(found: Internals) -> str:
    first, last = found.stream_variance[0], found.stream_variance[-1]
    return (
        f"The stream's variance {_change(last / first)} "
        f"({number(first)} after the embedding, {number(last)} at the end)."
    )


def _tokens(found: Internals) -> str:
    first, last = found.token_correlation[0], found.token_correlation[-1]
    return (
        f"Two tokens of a sequence begin with a mean cosine of {first:.2f} and end with {last:.2f}; 1 is rank collapse."
    )


def number(value: float) -> str:
    """Two digits: 1.4, 31, 310, 3.1e4."""
    if not np.isfinite(value):
        return str(value)
    if 0.1 <= abs(value) < 1000:
        return f"{value:#.2g}".rstrip(".") if abs(value) < 99.5 else f"{float(f'{value:.2g}'):.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
