"""Configurations by name: those of configs/ and data/ are packaged, a real file wins, mistakes name the nearest."""

from pathlib import Path

import pytest
from support.samples import REPOSITORY

from stablelm.config import packaged
from stablelm.config.load import load
from stablelm.errors import ConfigError


def test_every_configuration_of_the_repository_has_a_name():
    ours = [REPOSITORY / "configs", REPOSITORY / "configs" / "runs", REPOSITORY / "data"]
    files = {path.resolve() for folder in ours for path in folder.glob("*.yaml")}
    found = {name: packaged.find(name) for name in packaged.names()}
    assert {path.resolve() for path in found.values() if path is not None} == files
    assert {"quickstart", "runs/c4-24x256", "data/c4"} <= set(found)


@pytest.mark.parametrize("name", packaged.names())
def test_a_name_is_as_good_as_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    file = packaged.find(name)
    expected = load([str(file)], []).config
    prefix = "" if name.startswith("data/") else "configs/"
    assert load([name], []).config == load([f"{prefix}{name}.yaml"], []).config == expected


def test_a_real_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("train: {steps: 3}\n")
    loaded = load(["quickstart"], [])
    assert loaded.config.train.steps == 3
    assert loaded.origins == {"train.steps": "quickstart:1"}
    (tmp_path / "quickstart").unlink()
    (tmp_path / "quickstart").mkdir()  # a folder of that name is no configuration
    assert load(["quickstart"], []).config.model.n_layers == 24


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("quikstart", "name an existing YAML file, or the packaged quickstart"),
        ("c4-7b-384", "or the packaged runs/c4-7b-384"),
        ("configs/runs/c4-7b-83.yaml", "or the packaged runs/c4-7b-3"),
        ("../../etc/passwd", "cannot be read: No such file or directory; name an existing YAML file"),
        ("mine", "or a packaged one: data/c4, "),
    ],
)
def test_an_unknown_name(asked: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as found:
        load([asked], [])
    assert says in str(found.value)
    assert str(found.value).startswith(f"--config {asked} cannot be read: ")


def test_names_stay_inside_the_package():
    for asked in ("../pyproject", "runs/../../../etc/passwd", "data", "", ".", "accelerate/fsdp2"):
        assert packaged.find(asked) is None
