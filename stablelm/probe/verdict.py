"""The figures in words: each signal of the start beside those of recorded runs; no prediction of failure.

A signal counts as evidence only where the recorded runs separate on it: beyond all that trained and some that did not,
or short of all that did not train and some that did. Everywhere else there is no evidence either way, and it says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stablelm.observe.layer_hooks import Internals
from stablelm.probe.predict import Prediction
from stablelm.probe.run_records import RunRecord
from stablelm.probe.signals import Signals

REFERENCE = "deepscalelm_pre"
STEADY = 1.05
ENOUGH = 2
"""Recorded models, or runs, from which on there is evidence."""
Status = Literal["against", "for", "none"]


@dataclass(frozen=True)
class Kind:
    """How a signal is compared: `badness` grows towards the bad end, `shown` is what a reader sees.

    `by_rate`: it depends on the learning rate, so that runs are compared; else models, which trained if they did at any
    recorded rate.
    """

    name: str
    words: str
    shown: Callable[[Signals], float]
    badness: Callable[[Signals], float]
    by_rate: bool = False


def factor(ratio: float) -> float:
    """A ratio as a factor of at least 1, whichever end is larger."""
    return max(ratio, 1 / ratio) if ratio > 0 else np.inf


def _high(name: str, words: str, shown: Callable[[Signals], float]) -> Kind:
    return Kind(name, words, shown, shown)


def _after(name: str, words: str, shown: Callable[[Signals], float]) -> Kind:
    return Kind(name, f"{words} the first steps", shown, shown, by_rate=True)


KINDS = (
    _high("gradient_factor", "gradient factor over depth", lambda s: factor(s.gradient_ratio)),
    _high("token_cosine", "cosine of two tokens at the end", lambda s: s.token_cosine),
    _high("excess_loss", "first loss above ln(vocabulary)", lambda s: s.excess_loss),
    Kind(
        "attention_entropy",
        "smallest attention entropy of a layer, as a share of uniform attention's",
        lambda s: s.attention_entropy,
        lambda s: -s.attention_entropy,
    ),
    _high("sensitivity", "sensitivity to random changes of the weights", lambda s: s.sensitivity),
    _after("update_output_change", "change of the output by", lambda s: s.update_output_change),
    _after("update_stream_growth", "growth of the stream by", lambda s: s.update_stream_growth),
    _after("update_token_cosine", "cosine of two tokens after", lambda s: s.update_token_cosine),
)


@dataclass(frozen=True)
class Evidence:
    """A signal beside the recorded ones: (low, high, how many) of those that trained and of those that did not."""

    name: str
    words: str
    value: float
    status: Status
    trained: tuple[float, float, int] | None
    failed: tuple[float, float, int] | None
    unit: str

    def in_words(self) -> str:
        """The value, and what was recorded in brackets behind it."""
        sides = [("trained", self.trained), ("did not train", self.failed)]
        known = [
            f"{count} {self.unit} that {which}: {self._number(low)} to {self._number(high)}"
            for which, (low, high, count) in ((which, side) for which, side in sides if side is not None)
        ]
        return f"{self.words} {self._number(self.value)} ({'; '.join(known) or 'nothing recorded'})"

    def _number(self, value: float) -> str:
        """Of a cosine all the digits that show a collapse."""
        return f"{value:.4f}" if "cosine" in self.name else number(value)


@dataclass(frozen=True)
class Verdict:
    """Sentences, and the evidence that they quote."""

    text: str
    evidence: tuple[Evidence, ...]


def weigh(kind: Kind, signals: Signals, records: Sequence[RunRecord]) -> Evidence:
    """One signal against the recorded runs; records without a finite value of it are left out."""
    found = [(kind.badness(r.signals), kind.shown(r.signals), r) for r in records]
    found = [(bad, shown, record) for bad, shown, record in found if np.isfinite(bad) and np.isfinite(shown)]
    models = {record.settings for _, _, record in found if record.trained}
    good: dict[str, tuple[float, float]] = {}
    poor: dict[str, tuple[float, float]] = {}
    for index, (bad, shown, record) in enumerate(found):
        trained = record.trained if kind.by_rate else record.settings in models
        key = f"{index}" if kind.by_rate else record.settings
        (good if trained else poor)[key] = bad, shown
    return Evidence(
        kind.name,
        kind.words,
        kind.shown(signals),
        _status(
            kind.badness(signals),
            [bad for bad, _ in good.values()],
            [bad for bad, _ in poor.values()],
            least_is_best=not kind.by_rate,
        ),
        _span([shown for _, shown in good.values()]),
        _span([shown for _, shown in poor.values()]),
        "runs" if kind.by_rate else "models",
    )


def _status(value: float, good: list[float], poor: list[float], *, least_is_best: bool) -> Status:
    """Evidence only outside the range in which both outcomes lie, and where `ENOUGH` recorded ones agree.

    Against: so many that did not train were milder than this, yet beyond all that trained. For: so many that trained
    were worse than this, yet short of all that did not. Less than all that trained is as good as the least, unless a
    rate too small may be the reason.
    """
    worst_good, best_poor = max(good, default=np.inf), min(poor, default=-np.inf)
    if sum(worst_good < bad <= value for bad in poor) >= ENOUGH:
        return "against"
    known = least_is_best or value >= min(good, default=np.inf)
    if known and sum(value <= bad < best_poor for bad in good) >= ENOUGH:
        return "for"
    return "none"


def _span(values: list[float]) -> tuple[float, float, int] | None:
    return (min(values), max(values), len(values)) if values else None


def verdict(
    found: Internals,
    signals: Signals | None,
    reference: Prediction | None,
    records: Sequence[RunRecord],
    precision: str,
) -> Verdict:
    """Sentences on the evidence, the gradient over depth, the stream's growth and the tokens' correlation.

    `signals`: None where they were not measured. `reference`: the prediction for `REFERENCE` at the same shape, None
    where the model is just that.
    """
    sentences, evidence = _not_finite(found, precision), ()
    if not sentences:
        if signals is not None:
            evidence = tuple(weigh(kind, signals, records) for kind in KINDS)
            sentences += _weighed(evidence, records)
        sentences += [_gradient(found.gradient_norm), _stream(found), _tokens(found)]
    if reference is not None:
        ends = reference.gradient_norm[1], reference.gradient_norm[-1]
        growth = reference.stream_variance[-1] / reference.stream_variance[0]
        sentences.append(
            f"For {REFERENCE} at this shape the theory has a gradient factor of {number(factor(ends[0] / ends[1]))}, "
            f"a growth of {number(growth)} and a cosine of {reference.token_correlation[-1]:.2f}."
        )
    return Verdict(" ".join(sentences), evidence)


def _weighed(evidence: Sequence[Evidence], records: Sequence[RunRecord]) -> list[str]:
    if not records:
        return ["There is no recorded run to compare with."]
    by_status: dict[str, list[Evidence]] = {"against": [], "for": [], "none": []}
    for each in evidence:
        by_status[each.status].append(each)
    shapes = " and ".join(dict.fromkeys(f"{r.n_layers} layers x {r.d_model}" for r in records))
    place = f"{len(records)} recorded runs ({shapes})"
    openings = {
        "against": f"Evidence against it in {place}, beyond all that trained",
        "for": f"Evidence for it in {place}, short of all that did not train",
        "none": "No evidence either way"
        if by_status["against"] or by_status["for"]
        else f"No evidence either way in {place}",
    }
    return [
        f"{opening}: {'; '.join(each.in_words() for each in by_status[status])}."
        for status, opening in openings.items()
        if by_status[status]
    ]


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


def _gradient(norms: np.ndarray) -> str:
    change = _change(norms[1] / norms[-1])
    return f"The gradient {change} from the top to the bottom of the stack (layer {len(norms) - 1} to layer 1)."


def _change(ratio: float) -> str:
    if factor(ratio) < STEADY:
        return "keeps its size"
    return f"{'falls' if ratio < 1 else 'grows'} by a factor of {number(factor(ratio))}"


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
    if value == 0 or 0.1 <= abs(value) < 1000:
        return f"{value:#.2g}".rstrip(".") if abs(value) < 99.5 else f"{float(f'{value:.2g}'):.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
