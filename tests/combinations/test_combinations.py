"""Part of the covering array in each test run; `make combinations` runs all of it."""

from pathlib import Path

import pytest
from combinations import rows
from combinations.rows import CHECKED, FAST
from combinations.run import make_sources, run_row
from support.pairwise import pairs_of
from support.samples import REPOSITORY

from stablelm.methods.catalogue import METHODS

pytestmark = pytest.mark.xdist_group("combinations")  # the array is made once

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
    [pytest.param(index, marks=pytest.mark.slow if index >= FAST else ()) for index in range(CHECKED)],
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
    values = {item for case in cover.cases for item in case.items() if item[0] != "method"}
    assert values == {(axis, value) for axis, known in rows.AXES.items() for value in known}


def test_every_method_is_in_a_row_of_its_mechanism():
    members = [name for names in rows.MECHANISMS.values() for name in names]
    assert sorted(members) == sorted(METHODS)
    placed = {(case["mechanism"], case["method"]) for case in rows.array().cases}
    assert placed == {(kind, name) for kind, names in rows.MECHANISMS.items() for name in names}


def test_the_page_tells_the_size_of_the_array():
    page = (REPOSITORY / "docs" / "engines.md").read_text()
    assert f"one of its {len(rows.array().cases)} rows" in page
    assert f"`make test` runs {FAST} of the rows, `make test-slow` {CHECKED - FAST} more" in page
