"""Advice from records: measured, interpolated, none; and records that somebody damaged."""

import json
import math
from pathlib import Path

import pytest
from support.programs import run
from support.studies import loss_like, pretend, write_study
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS
from stablelm.study.advice_text import words
from stablelm.study.advise import INTERPOLATED, MEASURED, Question, advise, study_text
from stablelm.study.cells import cells_of
from stablelm.study.literature import PUBLISHED
from stablelm.study.records import StudyRecord, as_lines, read_records, records_of
from stablelm.study.report.findings import findings
from stablelm.study.study_file import read_study


@pytest.fixture(scope="module")
def records(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[StudyRecord]:
    """Of depths 2, 8 and 32 at width 32, 512 tokens; the best rate falls as the root of the depth."""
    folder = tmp_path_factory.mktemp("study")
    grid = {"model.method": ["pre_ln", "deepnorm"], "depth": [2, 8, 32]}
    study = read_study(str(write_study(folder, tiny_corpus, grid=grid, lr={"start": [1e-3, 4e-3], "max_runs": 9})))
    cells = cells_of(study)
    return list(records_of(findings(study, cells, pretend(study, cells, loss_like), {})))


def test_a_measured_size(records: list[StudyRecord]):
    found = advise(Question("pre_ln", 8, 32, 512), records)
    assert found is not None and found.grade == MEASURED
    assert found.low <= found.rate <= found.high and found.rate == pytest.approx(2e-3, rel=0.5)
    assert found.loss == pytest.approx(2.7, abs=0.03) and found.half is not None
    assert len(found.quoted) == 1 and len(found.quoted[0]["runs"]) == 3
    assert found.second is not None and "better" in found.second[0] and found.second[1]["method"] == "deepnorm"


def test_a_size_between_is_interpolated_and_none_beyond_extrapolated(records: list[StudyRecord]):
    found = advise(Question("pre_ln", 16, 32, 512), records)
    assert found is not None and found.grade == INTERPOLATED and found.loss is None
    rates = {each["n_layers"]: each["rate"] for each in records if each["method"] == "pre_ln"}
    assert min(rates[8], rates[32]) <= found.rate <= max(rates[8], rates[32])
    beyond = advise(Question("pre_ln", 100, 64, 1024), records)
    assert beyond is not None and beyond.grade == INTERPOLATED and beyond.rate == rates[32]
    assert beyond.high / beyond.low > found.high / found.low * 0.99
    assert any("a study of pre_ln at 100x64" in line for line in beyond.caution)


FAR = [
    Question("pre_ln", 129, 32, 512),
    Question("pre_ln", 8, 129, 512),
    Question("pre_ln", 8, 32, 2049),
    Question("gpt2", 8, 32, 512),
]


@pytest.mark.parametrize("question", FAR)
def test_no_evidence_beyond_a_factor_of_four(records: list[StudyRecord], question: Question):
    assert advise(question, records) is None


def test_papers_where_nothing_is_recorded(records: list[StudyRecord]):
    question = Question("magneto", 64, 768, 10**9)
    assert advise(question, records) is None
    said = words(question, None, records)
    assert "magneto at 64x768, 1,000,000,000 tokens: literature" in said and "learning rate  0.0012" in said
    assert "arXiv 2210.06423" in said and "These six to nine runs would tell" in said
    assert "0.001 diverged at 24 layers" in words(Question("pre_ln", 24, 1024, 10**9), None, [])
    for far in (
        Question("magneto", 300, 768, 10**9),
        Question("magneto", 24, 128, 10**9),
        Question("keel", 24, 1024, 9),
    ):
        assert "no evidence" in words(far, None, records)
    assert all(each.method in METHODS for each in PUBLISHED)


def test_other_keys_of_a_grid_are_another_model(records: list[StudyRecord]):
    changed = [record | {"other": {"model.activation": "relu"}} for record in records]
    assert advise(Question("pre_ln", 8, 32, 512), changed) is None  # type: ignore[arg-type]


def test_the_program_in_words(records: list[StudyRecord], tmp_path: Path):
    file = tmp_path / "records.jsonl"
    file.write_text(as_lines(records))
    size = ["--depth", "8", "--d-model", "32", "--tokens", "512", "--records", str(file)]
    done = run("advise", "--method", "pre_ln", *size)
    assert done.returncode == 0, done.stderr
    assert "pre_ln at 8x32, 512 tokens: measured" in done.stdout and "second choice  deepnorm" in done.stdout
    assert all(name in done.stdout for name in next(r for r in records if r["n_layers"] == 8)["runs"])
    study = tmp_path / "study.yaml"
    declined = run("advise", "--method", "gpt2", *size, "--study", str(study))
    assert declined.returncode == 0 and "no evidence" in declined.stdout and study.exists()
    assert read_study(str(study)).shapes.list_ == ["8x32"]
    assert run("advise", "--method", "gpt2", *size, "--study", str(study)).returncode == 78
    assert "did you mean" in run("advise", "--method", "pre_lm", *size).stderr


@pytest.mark.parametrize("question", [Question("pre_ln", 7, 32, 512), Question("a.b:C", 7, 40, 10**9)])
def test_the_study_that_would_tell_is_one(question: Question, tmp_path: Path):
    (tmp_path / "study.yaml").write_text(study_text(question))
    study = read_study(str(tmp_path / "study.yaml"))
    assert study.grid == {"model.method": [question.method]} and study.budget.tokens == question.tokens


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"rate": 0}, "must be above 0"), ({"rate": "1"}, "is not a record"), ({"rate": None}, "is not a record")],
)
def test_damaged_records_are_named(records: list[StudyRecord], tmp_path: Path, change: dict, sentence: str):
    file = tmp_path / "records.jsonl"
    file.write_text(as_lines(records) + json.dumps(records[0] | change) + "\n")
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_records([file])
    assert f"{file}:{len(records) + 1}" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_records([tmp_path / "none"])


def test_records_leave_out_what_says_nothing(tiny_corpus: TinyCorpus, tmp_path: Path):
    study = read_study(str(write_study(tmp_path, tiny_corpus)))
    cells = cells_of(study)
    made = pretend(study, cells, lambda run: math.inf if run.cell.shape.n_layers == 4 else loss_like(run))
    bigrams = {cell.name: 2.88 for cell in cells}
    assert [each["method"] for each in records_of(findings(study, cells, made, bigrams))] == ["deepnorm"]
