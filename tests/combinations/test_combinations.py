"""Part of the covering array in each test run; `make combinations` runs all of it."""

from pathlib import Path

import pytest
from combinations import rows
from combinations.rows import MORE, QUICK
from combinations.run import make_sources, run_row
from support.pairwise import pairs_of

FAST = 2
"""Rows that `make test` runs."""


# What refusals of impossible pairs say.
REASONS = (
    "not possible",
    "cuts a sequence",
    "without skips and norms dropout multiplies the variance",
    "averages what train.optimizer=schedule_free averages already",
    "the logits have factors of their own, which the token table would share",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> rows.Sources:
    return make_sources(tmp_path_factory.mktemp("combinations") / "corpus")


@pytest.mark.parametrize(
    "index",
    [pytest.param(index, marks=pytest.mark.slow if index >= FAST else ()) for index in range(QUICK + MORE)],
)
def test_a_killed_run_goes_on_elsewhere_as_if_nothing_had_happened(index: int, sources: rows.Sources, tmp_path: Path):
    run_row(rows.in_order()[index], sources, tmp_path / "row")


def test_every_pair_is_in_a_row_or_refused_with_a_reason():
    cover = rows.array()
    held = {pair for case in cover.cases for pair in pairs_of(case)}
    assert held >= cover.possible
    assert not any(rows.refusal(case) for case in cover.cases)
    for pair in cover.impossible:
        refusal = rows.refusal(dict(pair)) or ""
        assert any(reason in refusal for reason in REASONS), (pair, refusal)
    values = {item for case in cover.cases for item in case.items()}
    assert values == {(axis, value) for axis, known in rows.AXES.items() for value in known}
