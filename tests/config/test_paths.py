"""In every key that is a path `~` is the home directory and `$` is refused, wherever the path is given."""

import os
from pathlib import Path

import pytest

from stablelm.config.keys import is_mapping, keys, takes_list, value_type, values
from stablelm.config.load import dump, load
from stablelm.errors import ConfigError

PATHS = []
"""(key, entry) of everything that is a path."""
for _key in keys().values():
    if is_mapping(_key.type) and _key.path:
        PATHS += [(_key, entry) for entry in (_key.path if isinstance(_key.path, tuple) else ("x.path", "x"))]
    elif _key.path:
        PATHS.append((_key, ""))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", "/home/of-mine")
    return "/home/of-mine"


def value(config, key, entry):
    found = values(config)[key.name]
    return found[entry] if entry else found


@pytest.mark.parametrize(("key", "entry"), PATHS, ids=lambda it: getattr(it, "name", it))
def test_every_path_key(key, entry: str, home: str, tmp_path: Path):
    name = f"{key.name}.{entry}" if entry else key.name
    file = tmp_path / "a.yaml"
    file.write_text(f"{name}: ~/a\n")
    for loaded in (load([], [f"{name}=~/a"]), load([str(file)], [])):
        assert value(loaded.config, key, entry) == f"{home}/a"
        assert value(loaded.asked, key, entry) == "~/a"
        assert "~/a" in dump(loaded.asked)
    if takes_list(value_type(key, entry)):
        listed = load([], [f"{name}=[~/a, b, ~/c]"]).config
        assert value(listed, key, entry) == [f"{home}/a", "b", f"{home}/c"]
    for wrong in ("$HOME/a", "${HOME}/a", "a/$B", "'s3://$BUCKET/a'"):
        with pytest.raises(ConfigError) as caught:
            load([], [f"{name}={wrong}"])
        fix = "write ~/a" if "HOME" in wrong else "write its value"
        assert str(caught.value).startswith(f"{name}={wrong.strip(chr(39))} holds a $")
        assert fix in str(caught.value)
        assert str(caught.value).endswith(f"(argument {name}={wrong})")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("./~a", "./~a"),
        ("a/~/b", "a/~/b"),
        ("a~", "a~"),
        ("s3://bucket/~a", "s3://bucket/~a"),
        ("file://~/a", "file:///home/of-mine/a"),
        ("file:///a", "file:///a"),
        ("~/", "/home/of-mine/"),
        ("~root/a", os.path.expanduser("~root/a")),
    ],
)
def test_what_is_the_home_directory(path: str, meant: str):
    assert load([], [f"data.path={path}"]).config.data.path == meant


def test_a_user_who_does_not_exist():
    with pytest.raises(ConfigError, match=r"run\.dir=~nobody-here/a: the home directory of ~nobody-here is not known"):
        load([], ["run.dir=~nobody-here/a"])


def test_words_that_are_no_path_are_left_alone():
    config = load([], ["data.text_column=~/a$b", "data.dataset.name=~x$", "data.storage.s3.profile=$x"]).config
    assert (config.data.text_column, config.data.dataset["name"]) == ("~/a$b", "~x$")
    assert config.data.storage["s3.profile"] == "$x"


def test_every_mistaken_path_is_told(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("run:\n  dir: $A/x\ndata:\n  path: [a, $B/x]\n")
    with pytest.raises(ConfigError) as caught:
        load([str(file), "$C/b.yaml"], ["checkpoint.dir=$D/x"])
    lines = str(caught.value).splitlines()
    assert [line.split(" holds")[0] for line in lines] == [
        "--config $C/b.yaml",
        "run.dir=$A/x",
        "data.path=$B/x",
        "checkpoint.dir=$D/x",
    ]
    assert lines[1].endswith(f"({file}:2)") and lines[2].endswith(f"({file}:4)")
