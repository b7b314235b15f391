"""The commands of docs/studies.md, on its study made small."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from support.pages import DOCS, blocks, commands, run_command
from support.programs import run
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.methods.catalogue import METHODS
from stablelm.optimizers.catalogue import OPTIMIZERS
from stablelm.study.study_file import COORDINATES, read_study

PAGE = DOCS / "studies.md"
EVERY = [
    ("every-method", "model.method", list(METHODS)),
    ("every-optimizer", "train.optimizer", list(OPTIMIZERS)),
]


@pytest.mark.slow
def test_the_study_of_the_page_runs_and_is_reported(tiny_corpus: TinyCorpus, tmp_path: Path):
    asked, sizes = blocks(PAGE, "yaml")
    (tmp_path / "my-sizes.yaml").write_text(sizes)
    assert read_study(str(tmp_path / "my-sizes.yaml")).kind == COORDINATES
    file = tmp_path / "my-depths.yaml"
    file.write_text(asked)
    assert read_study(str(file)).grid["depth"] == [4, 8]
    small = yaml.safe_load(asked) | {"budget": {"tokens": 2048}, "lr": {"fixed": [1.0e-3]}}
    small["base"] = str(REPOSITORY / small["base"])
    small["grid"] |= {"depth": [4]}
    file.write_text(yaml.safe_dump(small))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(REPOSITORY / "data" / "cache")
    said = {}
    for line in commands(PAGE):
        _, program, *arguments = shlex.split(line)
        if "submit" in arguments:
            continue  # tests/slurm/test_study_arrays.py
        if "train_tokenizer" in program:
            assert run_command(line, tmp_path, tiny_corpus).returncode == 0
            continue
        done = run(Path(program).stem, *arguments, cwd=tmp_path, timeout=290)
        assert done.returncode == 0, line + done.stdout + done.stderr
        said[arguments[0]] = done.stdout
    assert "2 cells, 8 to 8 runs" in said["expand"]
    assert "2 of 2 cells are done; 8 runs have results" in said["status"]
    assert (tmp_path / "runs/studies/my-depths/report/report.html").is_file()


def test_every_key_of_the_table_is_one():
    table = PAGE.read_text().split("| key | what it says")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert named >= {
        "study",
        "base",
        "grid",
        "budget",
        "shapes.rule",
        "lr.start",
        "seeds.tune",
        "limits.jobs",
        "results",
    }


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_of_the_repository_are_studies(file: Path):
    if "study:" in file.read_text():
        assert read_study(str(file)).study == file.stem


@pytest.mark.parametrize(("name", "key", "known"), EVERY)
def test_studies_of_everything_leave_nothing_out(name: str, key: str, known: list[str]):
    assert sorted(read_study(str(REPOSITORY / "configs" / "study" / f"{name}.yaml")).grid[key]) == sorted(known)
