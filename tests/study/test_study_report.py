"""Reports of results that never ran: what they conclude, what withholds it, and how long they take."""

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.studies import loss_like, pretend, pretended, write_study
from support.tiny import TinyCorpus

from stablelm.study import results
from stablelm.study.cells import Run, cells_of
from stablelm.study.report.conclusions import banners, limits, verdicts
from stablelm.study.report.figures import pareto
from stablelm.study.report.findings import Findings, findings, outcomes, regret, transfer
from stablelm.study.report.ranking import ranking
from stablelm.study.report.tables import as_markdown, tables
from stablelm.study.report.writer import contents_of, write_report
from stablelm.study.study_file import read_study

Change = Callable[[Run], float]


def found(
    folder: Path, corpus: TinyCorpus, loss: Change = loss_like, bigram: float | None = 4.0, **changes: Any
) -> Findings:
    study = read_study(str(write_study(folder, corpus, **changes)))
    cells = cells_of(study)
    made = pretend(study, cells, loss)
    return findings(study, cells, made, dict.fromkeys([cell.name for cell in cells], bigram))


def test_the_better_method_is_found_with_its_rate(tiny_corpus: TinyCorpus, tmp_path: Path):
    own = found(tmp_path, tiny_corpus)
    for depth in (2, 4):
        best, other = ranking(own, depth, "")
        assert best.finding.arm == "deepnorm" and best.share_best > 0.8 and best.behind is None
        assert other.behind is not None and other.behind.mean == pytest.approx(0.05, abs=0.02)
        assert not other.ties and other.p is not None and other.p < 0.05
        assert best.finding.vertex is not None
        assert best.finding.vertex.rate == pytest.approx(4e-3 / math.sqrt(depth / 2), rel=0.15)
    assert own.spread is not None and 0.001 < own.spread[0] < 0.01
    lines = verdicts(own)
    assert lines[0].startswith("Depth 2: deepnorm has the lowest loss, 2.8") and "behind it pre_ln (+0.0" in lines[0]
    assert any("no change that the seeds show" in line for line in lines)
    assert banners(own) == []
    assert limits(own)[0][1]  # few tokens a parameter are stressed


def test_a_small_difference_is_a_tie_and_said_so(tiny_corpus: TinyCorpus, tmp_path: Path):
    own = found(tmp_path, tiny_corpus, lambda run: loss_like(run) + 0.05 * ("deepnorm" in run.cell.name))
    assert all(place.ties for place in ranking(own, 2, "") + ranking(own, 4, ""))
    assert "; a tie with" in verdicts(own)[0]


def test_slopes_and_regret_over_depth(tiny_corpus: TinyCorpus, tmp_path: Path):
    grid = {"model.method": ["pre_ln"], "depth": [2, 8, 32, 128]}
    own = found(tmp_path, tiny_corpus, grid=grid, lr={"start": [1e-3, 4e-3], "refine": 1.2, "max_runs": 20})
    fit = transfer(own, "pre_ln", "")
    assert fit is not None and fit.half is not None
    assert fit.slope == pytest.approx(-0.5, abs=0.1)
    lost = regret(own, "pre_ln", 8, "")
    assert lost is None or lost == pytest.approx(0.1 * math.log(2) ** 2, abs=0.02)
    assert any("misses the rate at depth 128 by a factor of" in line for line in verdicts(own))


def test_what_withholds_a_verdict(tiny_corpus: TinyCorpus, tmp_path: Path):
    def loss(run: Run) -> float:
        if run.cell.shape.n_layers == 4 and "pre_ln" in run.cell.name:
            return 3.0 - 0.1 * math.log(run.lr)  # best at the highest rate
        return math.inf if run.lr > 1e-2 else loss_like(run)

    own = found(tmp_path, tiny_corpus, loss, bigram=2.89, seeds={"tune": [0], "confirm": [1, 2]})
    words = "\n".join(banners(own))
    assert "The best rate of pre_ln at depth 4 is not known: the best rate 0.256 is the last one" in words
    assert "pre_ln at depth 2 stays above the bigram model (2.8900 nats)" in words
    assert "Fewer than 3 confirming seeds: pre_ln at depth 2 (2)" in words
    assert "diverged" in verdicts(own)[-1] and not any("Depth" in line for line in verdicts(own))
    cell = own.at("deepnorm", 2, "")
    assert cell is not None and outcomes(cell)[1.6e-2] == results.NOT_FINITE


def test_losses_above_the_bigram_model_are_compared_nowhere(tiny_corpus: TinyCorpus, tmp_path: Path):
    lines = verdicts(found(tmp_path, tiny_corpus, bigram=2.0))
    assert not any("lowest loss" in line or " against " in line for line in lines)
    assert any(" against " in line for line in verdicts(found(tmp_path, tiny_corpus)))


def test_mixed_commits_and_a_loaded_machine_are_said(tiny_corpus: TinyCorpus, tmp_path: Path):
    own = found(tmp_path, tiny_corpus)
    own.runs[0]["provenance"] |= {"commit": "d" * 40, "changed": True, "load": 9.0}
    words = "\n".join(banners(own))
    assert "The runs are of 2 commits: cccccccc, dddddddd." in words
    assert "uncommitted changes" in words and "1 of 32 runs were timed while other work ran" in words


@pytest.mark.parametrize(
    "changes", [{}, {"budget": {"flops": [5e7, 1e8]}}, {"grid": {"model.method": ["pre_ln"], "depth": [2]}}]
)
def test_every_table_has_its_columns_and_no_traceback_without_results(
    tiny_corpus: TinyCorpus, tmp_path: Path, changes: dict[str, Any]
):
    study = read_study(str(write_study(tmp_path, tiny_corpus, **changes)))
    cells = cells_of(study)
    empty = findings(study, cells, {}, {})
    page = write_report(contents_of(empty), tmp_path / "empty")
    assert "Nothing yet: no run has finished." in page.read_text()
    for own in (empty, findings(study, cells, pretend(study, cells), {})):
        for table in tables(own):
            assert all(len(row) == len(table.heading) for row in table.rows), table.name
            assert as_markdown(table).count("\n") == 1 + len(table.rows)


def test_the_report_is_whole_and_quick(tiny_corpus: TinyCorpus, tmp_path: Path):
    grid = {"model.method": ["pre_ln", "deepnorm", "rezero", "magneto", "post_ln"], "depth": list(range(2, 14))}
    study = read_study(str(write_study(tmp_path, tiny_corpus, grid=grid)))
    cells = cells_of(study)
    made = pretend(study, cells)
    assert len(made) >= 480
    began = time.process_time()
    page = write_report(
        contents_of(findings(study, cells, results.read_results(study.results_folder), {})), tmp_path / "report"
    )
    assert time.process_time() - began < 30
    names = {file.stem for file in (tmp_path / "report" / "figures").glob("*.svg")}
    assert names >= {"loss-by-depth", "loss-by-rate", "outcomes", "rate-by-depth", "use-of-layers", "cost", "curves"}
    text = page.read_text()
    assert text.count("<img alt=") == len(names) and "<script" not in text and 'src="http' not in text
    rows = list(csv.reader((tmp_path / "report" / "tables" / "runs.csv").read_text().splitlines()))
    assert len(rows) == len(made) + 1
    for run_id in made:
        assert run_id in text


def test_hostile_words_of_results_do_not_reach_the_page(tiny_corpus: TinyCorpus, tmp_path: Path):
    study = read_study(str(write_study(tmp_path, tiny_corpus)))
    cells = cells_of(study)
    made = pretend(study, cells)
    evil = pretended(study, Run(cells[0], 0.123, 77), 3.0)
    evil["point"] = {"<script>alert(1)</script>": "\x1b[31m<img src=x>"}
    evil["provenance"]["commit"] = "<b>"
    page = write_report(
        contents_of(findings(study, cells, made | {evil["id"]: evil}, {})), tmp_path / "report"
    ).read_text()
    assert "<script" not in page and "<img src=x>" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page


def test_the_front_of_cost_and_loss():
    assert pareto([(3.0, 1.0), (1.0, 3.0), (2.0, 3.0), (2.0, 2.0), (4.0, 1.0)]) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
