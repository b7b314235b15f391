"""Pages of studies in Chromium: they fit phones and desks, and the browser has nothing to complain about."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chromium import chromium, visit
from support.studies import pretend, write_study
from support.tiny import TinyCorpus

from stablelm.probe.coordinates import FIGURES, STEPS
from stablelm.study.cells import cells_of
from stablelm.study.coordinates import runs_of
from stablelm.study.report.coordinates import contents
from stablelm.study.report.findings import findings
from stablelm.study.report.writer import contents_of, write_report
from stablelm.study.results import write_result
from stablelm.study.study_file import read_study

GRID = {"model.method": ["pre_ln", "deepnorm", "completep"], "train.weight_decay": [0.0, 0.1]}
KINDS: dict[str, dict[str, Any]] = {
    "training": {"grid": GRID | {"depth": [2, 4, 8]}},
    "coordinates": {
        "kind": "coordinates",
        "grid": GRID,
        "shapes": {"rule": "list", "list": [f"{n}x{d}" for n in (2, 4, 8) for d in (32, 64, 128)]},
        "budget": None,
        "lr": {"fixed": [4e-3]},
    },
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture(scope="module", params=KINDS)
def page(request, tiny_corpus: TinyCorpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    study = read_study(str(write_study(folder, tiny_corpus, study="a-very-long-name-" * 6, **KINDS[request.param])))
    cells = cells_of(study)
    if request.param == "training":
        return write_report(contents_of(findings(study, cells, pretend(study, cells), {})), folder / "report")
    for run in runs_of(study, cells):
        depth, width = run.cell.shape.n_layers, run.cell.shape.d_model
        figures = np.ones((STEPS + 1, len(FIGURES))) * depth**0.3 * width**-0.1
        kept = {"id": run.id, "study": study.study, "point": dict(run.cell.point), "shape": vars(run.cell.shape)}
        kept |= {"parameters": run.cell.counts, "lr": run.lr, "seed": run.seed, "figures": figures.tolist()}
        write_result(study.results_folder, kept | {"seconds": 1.0, "provenance": {"commit": "c" * 40}})
    return write_report(contents(study, cells), folder / "report")


@pytest.mark.xdist_group("chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_it_fits_its_width(browser, page: Path, width: int, dark: bool, tmp_path: Path):
    found = visit(browser, page, width=width, opened=True, dark=dark, picture=tmp_path / "page.png", whole=False)
    assert found.width <= width
    assert found.height > 2000 and (tmp_path / "page.png").stat().st_size > 10_000
    assert found.complaints == []
