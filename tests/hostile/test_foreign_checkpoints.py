"""What a checkpoint of somebody else may make our programs do: nothing but read it."""

import os
import random
import shutil
from pathlib import Path

import pytest
from hostile.checker import attempt
from hostile.checkpoints import FOREIGN, HARMS, Harm, make_run, random_damage
from support.tiny import TinyCorpus

READERS = (["eval", "--checkpoint"], ["checkpoints", "list"], ["checkpoints", "verify"])
QUICK = 36
"""Inputs of each `make test`, spread over the kinds."""
DAMAGED = 150


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run and what belongs to its victim."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, tiny_corpus)
    outside = folder / "outside"
    shutil.copytree(folder / "run", outside / "other")
    (outside / "kept.txt").write_text("kept\n")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, with a FIFO."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "outside" / "fifo")
    return tmp_path


def tried(place: Path, *line: str, **options):
    """The program on the run in the folder, which is watched whole but for the cache that it may make."""
    program, *arguments = line
    return attempt(program, *arguments, watched=place, own=[place / "data"], cwd=place, **options)


def every_harm() -> list:
    """All of them in an order that spreads the kinds; the later ones are slow."""
    harms = [*HARMS.values(), *map(random_damage, range(DAMAGED))]
    random.Random(0).shuffle(harms)
    return [
        pytest.param(harm, id=harm.name, marks=[pytest.mark.slow] if index >= QUICK else [])
        for index, harm in enumerate(harms)
    ]


@pytest.mark.parametrize("harm", every_harm())
def test_a_foreign_run_is_only_read(harm: Harm, place: Path):
    harm.do(place / "run", place / "outside", random.Random(harm.name))
    for line in READERS:
        outcome = tried(place, *line, str(place / "run"))
        assert outcome.faults({0, 77, 78}) == [], (line, outcome.code)
        if line[0] == "eval" and harm.refused:
            assert outcome.code == 78, outcome.out


@pytest.mark.parametrize("harm", [harm for harm in FOREIGN if harm.name.startswith(("filter", "web", "cache"))][:4])
def test_as_a_program_of_its_own(harm: Harm, place: Path):
    harm.do(place / "run", place / "outside", random.Random(0))
    outcome = tried(place, "eval", "--checkpoint", str(place / "run"), fresh=True, seconds=30)
    assert outcome.faults({0, 77, 78}) == []
    assert (outcome.code == 78) == harm.refused
