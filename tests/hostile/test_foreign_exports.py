"""What a checkpoint of somebody else may make an export do: read it, and write to --out."""

import os
import random
import shutil
from pathlib import Path

import pytest
from hostile.checker import attempt
from hostile.checkpoints import HARMS, Harm, make_run, random_damage
from support.tiny import TinyCorpus

QUICK = 8
DAMAGED = 60


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run and what belongs to its victim."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, tiny_corpus, "model.norm=rmsnorm", "model.activation=swiglu")
    outside = folder / "outside"
    shutil.copytree(folder / "run", outside / "other")
    return folder


def every_harm() -> list:
    harms = [*HARMS.values(), *map(random_damage, range(DAMAGED))]
    random.Random(1).shuffle(harms)
    return [
        pytest.param(harm, id=harm.name, marks=[pytest.mark.slow] if index >= QUICK else [])
        for index, harm in enumerate(harms)
    ]


@pytest.mark.parametrize("harm", every_harm())
def test_an_export_of_a_foreign_run_writes_to_out_alone(harm: Harm, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "outside" / "fifo")
    harm.do(tmp_path / "run", tmp_path / "outside", random.Random(harm.name))
    outcome = attempt(
        *("export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")),
        watched=tmp_path, own=[tmp_path / "data", tmp_path / "out"], cwd=tmp_path, seconds=30,
    )  # fmt: skip
    assert outcome.faults({0, 77, 78}) == [], (outcome.code, outcome.err)
    assert outcome.code != 0 or (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out").exists() == (outcome.code == 0)
