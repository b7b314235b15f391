"""Advice from recorded studies: a method's learning rate, warm-up and loss at a size, and how well that is known."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stablelm.config import text
from stablelm.study.records import StudyRecord
from stablelm.study.statistics import line

NEAR = 4.0
"""The factor in depth, width and tokens within which a record says anything."""
SAME_SIZE, SAME_TOKENS = 1.05, 1.25
MEASURED, INTERPOLATED, LITERATURE, NONE = "measured", "interpolated", "literature", "no evidence"
SIZES = ("n_layers", "d_model", "tokens")


@dataclass(frozen=True)
class Question:
    method: str
    n_layers: int
    d_model: int
    tokens: int

    def distance(self, record: StudyRecord) -> dict[str, float]:
        """The factor, at least 1, between each size asked for and recorded."""
        asked = vars(self)
        return {name: max(asked[name] / record[name], record[name] / asked[name]) for name in SIZES}  # type: ignore[literal-required]

    def near(self, records: Sequence[StudyRecord]) -> list[StudyRecord]:
        return [each for each in records if not each["other"] and max(self.distance(each).values()) <= NEAR]

    def closest(self, records: Sequence[StudyRecord]) -> StudyRecord:
        return min(records, key=lambda each: sum(math.log(factor) for factor in self.distance(each).values()))


@dataclass(frozen=True)
class Advice:
    """`low` to `high`: where the best rate lies by the records; `quoted`: what it rests on; `second`: a next best."""

    question: Question
    grade: str
    rate: float
    low: float
    high: float
    warmup_fraction: float
    loss: float | None
    half: float | None
    quoted: list[StudyRecord]
    second: tuple[str, StudyRecord] | None
    caution: list[str]


def advise(question: Question, records: Sequence[StudyRecord]) -> Advice | None:
    """None where no recorded cell of the method lies within a factor of NEAR in every size."""
    own = question.near([each for each in records if each["method"] == question.method])
    if not own:
        return None
    closest = question.closest(own)
    factors = question.distance(closest)
    size = max(factors["n_layers"], factors["d_model"])
    measured = size <= SAME_SIZE and factors["tokens"] <= SAME_TOKENS
    rate, low, high, quoted = (
        (closest["rate"], closest["rate_low"], closest["rate_high"], [closest])
        if measured
        else _interpolated(question, own, closest)
    )
    return Advice(
        question,
        MEASURED if measured else INTERPOLATED,
        rate,
        low,
        high,
        closest["warmup_fraction"],
        closest["loss"] if measured else None,
        closest["half"] if measured else None,
        quoted,
        _second(question, records, closest),
        _cautions(question, quoted, measured),
    )


def _interpolated(
    question: Question, own: Sequence[StudyRecord], closest: StudyRecord
) -> tuple[float, float, float, list[StudyRecord]]:
    """Along the size in which the records differ most, between those on both sides; else the closest one's rate.

    Nothing is extrapolated: beyond the records the closest one's rate stands, with an interval widened by the factor.
    """
    rate, low, high = float(closest["rate"]), float(closest["rate_low"]), float(closest["rate_high"])
    for name in SIZES:
        series = [each for each in own if all(each[o] == closest[o] for o in SIZES if o != name)]  # type: ignore[literal-required]
        sizes = [each[name] for each in series]  # type: ignore[literal-required]
        if len(series) >= 2 and min(sizes) < vars(question)[name] < max(sizes):
            fit = line([(math.log(each[name]), math.log(each["rate"])) for each in series])  # type: ignore[literal-required]
            assert fit is not None
            found = math.exp(fit.at(math.log(vars(question)[name])))
            spread = max(high / rate, rate / low)
            return found, found / spread, found * spread, series
    widened = math.sqrt(max(question.distance(closest).values()))
    return rate, low / widened, high * widened, [closest]


def _second(question: Question, records: Sequence[StudyRecord], closest: StudyRecord) -> tuple[str, StudyRecord] | None:
    """The best other method that was recorded in the same study at the same size, with its verdict in words."""
    others = [
        each
        for each in question.near(records)
        if each["method"] != question.method
        and each["study"] == closest["study"]
        and all(each[name] == closest[name] for name in SIZES)  # type: ignore[literal-required]
    ]
    if not others:
        return None
    best = min(others, key=lambda each: each["loss"])
    difference = best["loss"] - closest["loss"]
    halves = [each["half"] for each in (best, closest)]
    tie = None in halves or abs(difference) <= math.hypot(*(half or 0.0 for half in halves))
    words = "a tie with it" if tie else f"{abs(difference):.3f} nats {'better' if difference < 0 else 'worse'}"
    return words, best


def _cautions(question: Question, quoted: Sequence[StudyRecord], measured: bool) -> list[str]:
    """What would change the advice."""
    lines = []
    ratio = max(each["tokens"] / each["parameters"] for each in quoted)
    if ratio < 5:
        lines.append(f"the records trained {ratio:.2g} tokens a parameter; longer runs often want a lower rate")
    if (vocab := {each["vocab_size"] for each in quoted}) and max(vocab) < 4096:
        lines.append(f"their vocabulary had {max(vocab):,} pieces")
    if not measured:
        lines.append(
            f"a study of {question.method} at {question.n_layers}x{question.d_model} with {question.tokens:,} tokens"
        )
    if min(len(each["seeds"]) for each in quoted) < 3:
        lines.append("fewer than three seeds confirmed the records")
    return lines


def study_text(question: Question) -> str:
    """The study file of nine runs that would tell: three rates, of which the best is confirmed with more seeds."""
    d_head = next(d for d in (64, 32, 16, 8, 4, 2, 1) if question.d_model % d == 0 and question.d_model >= 2 * d)
    name = re.sub(r"[^a-zA-Z0-9]+", "-", question.method)
    tree = {
        "study": f"advise-{name}-{question.n_layers}x{question.d_model}",
        "base": "configs/study/cpu.yaml",
        "grid": {"model.method": [question.method]},
        "shapes": {"rule": "list", "list": [f"{question.n_layers}x{question.d_model}"], "d_head": d_head},
        "budget": {"tokens": question.tokens},
        "lr": {"start": [1.0e-3, 4.0e-3, 1.6e-2], "max_runs": 6},
        "seeds": {"tune": [0], "confirm": [1, 2, 3]},
    }
    return text.write(tree)
