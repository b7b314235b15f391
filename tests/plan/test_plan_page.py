"""docs/planning.md shows what the program says now."""

import importlib.util
import re
import shlex

import pytest
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.plan.planner import make
from stablelm.plan.request import prepare

SPEC = importlib.util.spec_from_file_location("make_plan_page", REPOSITORY / "docs" / "make_plan_page.py")
assert SPEC is not None and SPEC.loader is not None
page_maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page_maker)
PAGE = page_maker.PAGE.read_text()


@pytest.mark.parametrize("command", page_maker.commands(PAGE))
def test_figures_on_the_page(command: str):
    """Parameters and collectives as they are, the peak as near as the estimate is."""
    words = shlex.split(command)
    files = [str(REPOSITORY / words[i + 1]) for i, word in enumerate(words) if word == "--config"]
    world_size = int(words[words.index("--world-size") + 1])
    overrides = [word for word in words[2:] if "=" in word]
    made = make(prepare(load(files, overrides), world_size, "h100-80", 8, simulated=False))
    shown = PAGE.split(f"$ {command}\n")[1].split("```")[0]
    assert f"parameters      {sum(p.elements for p in made.listed):>16,}\n" in shown
    for count in made.moved.counts.values():
        assert f"{count:,} " in shown
    total = re.search(r"total +([\d.]+) GB", shown)
    assert total is not None
    assert made.peak.total() / 1e9 == pytest.approx(float(total[1]), rel=0.05)
    assert ("does not fit" in shown) == (not made.fits)


@pytest.mark.slow
def test_the_page_is_what_the_program_says():
    command = page_maker.commands(PAGE)[-1]
    assert f"$ {command}\n{page_maker.output(command)}```" in PAGE
