"""docs/planning.md shows what the program says now."""

import importlib.util
import re
import shlex

import pytest
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.observe.accelerators import ACCELERATORS, FLAGS, chosen
from stablelm.plan.planner import make
from stablelm.plan.request import prepare
from stablelm.programs.plan import parse_arguments

SPEC = importlib.util.spec_from_file_location("make_plan_page", REPOSITORY / "docs" / "make_plan_page.py")
assert SPEC is not None and SPEC.loader is not None
page_maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page_maker)
PAGE = page_maker.PAGE.read_text()


def shown(command: str) -> str:
    return PAGE.split(f"$ {command}\n")[1].split("```")[0]


@pytest.mark.parametrize("command", page_maker.commands(PAGE))
def test_figures_on_the_page(command: str):
    """Parameters and collectives as they are, the peak as near as the estimate is."""
    arguments = parse_arguments(shlex.split(command)[2:])
    files = [str(REPOSITORY / file) for file in arguments.config]
    gpu = chosen(arguments.gpu, {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in FLAGS})
    page = shown(command)
    assert max(map(len, page.splitlines())) <= 80
    for ranks in arguments.world_sizes or (arguments.world_size,):
        if f"{ranks:,}   not possible" in page:
            continue
        made = make(prepare(load(files, arguments.overrides), ranks, gpu, 8, simulated=False), depth=False)
        assert f"{sum(p.elements for p in made.listed):,}" in page
        total = re.search(rf"^ +{ranks:,} +([\d.]+) GB .* (\w+)$|^  total +([\d.]+) GB", page, re.M)
        assert total is not None
        assert made.peak.total() / 1e9 == pytest.approx(float(total[1] or total[3]), rel=0.05)
        if arguments.world_size:
            assert all(f"{count:,} " in page for count in made.moved.counts.values())
            assert ("fits           no" in page) == (not made.fits)
        else:
            assert total[2] == ("yes" if made.fits else "no")


def test_the_table_of_accelerators_on_the_page():
    for known in ACCELERATORS.values():
        figures = (
            known.peak / 1e12,
            *(x / 1e9 for x in (known.memory, known.memory_bandwidth, known.link, known.network)),
        )
        row = " | ".join(f"{figure:,g}" for figure in (*figures, known.power))
        assert f"| `{known.name}` | {row} |\n" in PAGE


@pytest.mark.slow
def test_the_page_is_what_the_program_says():
    command = page_maker.commands(PAGE)[-1]
    assert page_maker.output(command) == shown(command)
