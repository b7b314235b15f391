"""The page in Chromium: it fits phones and desks, and the browser has nothing to complain about."""

import json

import pytest
from support.chromium import chromium, visit
from support.long_runs import write_long_run

from stablelm.observe.page.run_page import NAME, make_page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / ("a-very-long-name-of-a-run" * 6)
    run = write_long_run(folder, steps=400, layers=24, layers_every=10, evaluate_every=50)
    with open(run / "metrics.jsonl", "a") as file:
        samples = [{"prompt": "a" * 400, "text": "word " * 400}]
        file.write(json.dumps({"step": 400, "samples": samples}) + "\n")
        file.write(json.dumps({"step": 400, "val_loss/" + "v" * 200: 1.5, "mine/" + "m" * 200: 3}) + "\n")
    make_page(run, run / NAME)
    return run / NAME


@pytest.mark.xdist_group("chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_its_width(browser, page, width, opened, dark, tmp_path):
    found = visit(browser, page, width=width, opened=opened, dark=dark, picture=tmp_path / "page.png", whole=False)
    assert found.width <= width
    assert found.height > 2000 and (tmp_path / "page.png").stat().st_size > 10_000
    assert found.complaints == []


@pytest.mark.slow
@pytest.mark.xdist_group("chromium")
def test_a_long_and_deep_run_scrolls(browser, tmp_path):
    run = write_long_run(tmp_path / "run", steps=100_000, layers=192, layers_every=100, evaluate_every=2000)
    make_page(run, run / NAME)
    frames = sorted(visit(browser, run / NAME, width=1280, scroll=True).frame_seconds)
    assert len(frames) > 50
    # Software rendering on a shared machine; a page that is too heavy takes a second for a frame.
    assert frames[len(frames) // 2] < 0.05
