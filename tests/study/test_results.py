"""Result files: outcomes, curves, and files that somebody has changed."""

import json
import math
from pathlib import Path

import pytest
from support.studies import pretended, write_study
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.study import results
from stablelm.study.cells import Run, cells_of
from stablelm.study.results import Result, curve, losses, outcome, read_results, write_result
from stablelm.study.study_file import read_study


@pytest.fixture
def result(tiny_corpus: TinyCorpus, tmp_path: Path) -> Result:
    study = read_study(str(write_study(tmp_path, tiny_corpus)))
    return pretended(study, Run(cells_of(study)[0], 1e-3, 0), 3.25)


def test_a_result_is_read_as_it_was_written(result: Result, tmp_path: Path):
    write_result(tmp_path / "r", result)
    (found,) = read_results(tmp_path / "r").values()
    assert {name: found[name] for name in result} == json.loads(json.dumps(result))
    assert losses([found]) == {result["id"]: 3.25}
    assert read_results(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"val_loss": 3.25', '"val_loss": 2.25', "was changed after it was written; delete it"),
        ('"val_loss": 3.25', '"val_loss": "3"', "is no result of a run"),
        ('"val_loss": 3.25, ', "", "is no result of a run"),
        ("{", "", "is no result of a run"),
        ('"val_loss": 3.25', '"val_loss": 3.25, "val_loss": 3.25', "given twice"),
    ],
)
def test_a_changed_file_is_named(result: Result, tmp_path: Path, old: str, new: str, sentence: str):
    write_result(tmp_path / "r", result)
    file = tmp_path / "r" / f"{result['id']}.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_results(tmp_path / "r")
    assert str(file) in str(caught.value)


def test_a_renamed_file_is_named(result: Result, tmp_path: Path):
    write_result(tmp_path / "r", result)
    (tmp_path / "r" / f"{result['id']}.json").rename(tmp_path / "r" / f"{'0' * 16}.json")
    with pytest.raises(ConfigError, match="was changed"):
        read_results(tmp_path / "r")


FALLING = [6.0 - 0.03 * step for step in range(100)]


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (FALLING, 3.0, results.TRAINED),
        (FALLING, None, results.NOT_FINITE),
        (FALLING, math.nan, results.NOT_FINITE),
        ([*FALLING[:-1], math.nan], 3.0, results.NOT_FINITE),
        (FALLING, 4.95, results.NOTHING_LEARNT),
        (FALLING[:50] + [6.0] * 20 + FALLING[70:], 3.0, results.SPIKED),
        ([9.0] * 10 + FALLING[10:], 3.0, results.TRAINED),
        ([*FALLING[:50], 9.0, *FALLING[51:]], 3.0, results.TRAINED),
    ],
)
def test_outcomes(train: list[float], val: float | None, expected: str):
    assert outcome(train, val, 5.0, warmup=5) == expected


def test_a_curve_has_few_points_and_says_where_it_was_not_finite():
    points = curve({step: float(step) for step in range(1, 1001)})
    assert len(points) <= results.POINTS and points[-1][0] == 1000 and points[0] == [8, 4.5]
    assert curve({1: 2.0, 2: math.nan}) == [[1, 2.0], [2, None]]
