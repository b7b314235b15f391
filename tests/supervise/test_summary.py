"""summary.json: whose word it holds, and what is read back of a damaged one."""

import json
import math
from pathlib import Path

import pytest

from stablelm.supervise import attempts
from stablelm.supervise.attempts import read_summary, write_summary


def told(attempt: int, code: int) -> dict:
    return {"exit_code": code, "reason": "", "attempts": attempt, "loss": 1.5}


def test_the_word_of_a_later_attempt_stays(tmp_path: Path):
    for number in (1, 2):
        attempts.take(tmp_path, number)
    write_summary(tmp_path, told(2, 0))
    write_summary(tmp_path, told(1, 0))
    assert read_summary(tmp_path) == told(2, 0)


def test_an_attempt_that_was_taken_over_does_not_say_that_the_run_failed(tmp_path: Path):
    attempts.take(tmp_path, 1)
    attempts.take(tmp_path, 2)
    write_summary(tmp_path, told(1, 78))
    assert read_summary(tmp_path) == {}
    write_summary(tmp_path, told(1, 75))  # what it has committed is true, whatever became of the later one
    assert read_summary(tmp_path) == told(1, 75)
    write_summary(tmp_path, told(2, 0))
    assert read_summary(tmp_path) == told(2, 0)


def test_the_first_word_of_an_attempt_counts(tmp_path: Path):
    write_summary(tmp_path, told(1, 77))
    write_summary(tmp_path, told(1, 80))
    assert read_summary(tmp_path) == told(1, 77)


def test_numbers_that_are_not_finite_are_json_too(tmp_path: Path):
    write_summary(tmp_path, told(1, 76) | {"loss": math.nan, "val_loss": {"default": math.inf}})
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)["loss"] == "nan"
    assert read_summary(tmp_path)["val_loss"] == {"default": "inf"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "null", '{"exit_code": "0"}', '{"attempts": -1}', '{"attempts": true}', '{"attempts": 1e400}'),
        *('{"step": 1, "step": 2}', '{"loss": NaN}', "[" * 100_000, '{"attempts": 9' + "9" * 30 + "}", '{"reason": 1}'),
    ],
    ids=range(12),
)
def test_a_damaged_summary_is_none_and_is_written_anew(tmp_path: Path, content: str):
    (tmp_path / "summary.json").write_text(content)
    assert read_summary(tmp_path) == {}
    write_summary(tmp_path, told(1, 0))
    assert read_summary(tmp_path) == told(1, 0)
