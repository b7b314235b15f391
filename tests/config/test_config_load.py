"""Files and arguments become a Config, or a line for every mistake."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm.config import text
from stablelm.config.keys import keys, values
from stablelm.config.load import dump, load, nearest, parse_duration
from stablelm.config.schema import Config
from stablelm.errors import ConfigError


def file(tmp_path: Path, content: str, name: str = "a.yaml") -> str:
    path = tmp_path / name
    path.write_text(content)
    return str(path)


def problems(files: list[str], overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(files, overrides)
    assert caught.value.exit_code == 78
    return str(caught.value).splitlines()


def test_nothing_given_is_the_defaults():
    loaded = load([], [])
    assert loaded.config == Config()
    assert loaded.origins == {}


def test_files_merge_in_order_then_arguments(tmp_path):
    first = file(tmp_path, "train:\n  lr: 1e-3\n  steps: 5\ndata:\n  path: [a, b]\n  validation: {x: x.gz}\n")
    second = file(tmp_path, "train: {lr: 2e-3}\ndata: {path: [c], validation: {y: [y.gz]}}\nmodel:\n", "b.yaml")
    config = load([first, second], ["train.steps=7", "data.validation.z=z.gz"]).config
    assert (config.train.lr, config.train.steps, config.data.path) == (2e-3, 7, ["c"])
    assert config.data.validation == {"x": "x.gz", "y": ["y.gz"], "z": "z.gz"}


def test_an_empty_mapping_and_null_undo_what_was_given(tmp_path):
    given = file(tmp_path, "data: {validation: {x: x.gz}}\ntrain: {steps: 3}\n")
    config = load([given], ["data.validation={}", "train.steps=null"]).config
    assert config.data.validation == {}
    assert config.train.steps is None


def test_an_empty_section_changes_nothing(tmp_path):
    first = file(tmp_path, "train: {lr: 1e-3}\ndata: {validation: {x: y}}\n")
    second = file(tmp_path, "train:\n  # lr: 3\ndata:\n  validation:\n", "b.yaml")
    config = load([first, second], ["model=", "engine={}"]).config
    assert config.train.lr == 1e-3
    assert config.data.validation == {"x": "y"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.lr=3e-4", 3e-4),
        ("train.lr=3", 3.0),
        ("train.steps=1e5", 100_000),
        ("train.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("train.compile=true", True),
        ("data.path=[a,b]", ["a", "b"]),
        ("data.path=*.json.gz", "*.json.gz"),
        ("data.path=https://host/a?b=c#d", "https://host/a?b=c#d"),
        ("run.dir=on", "on"),
        ("run.dir='3'", "3"),
        ("run.time_limit=1:30:00", "1:30:00"),
        ("run.time_limit=90", 90.0),
        ("observe.profile=[2, 3]", (2, 3)),
        ("model.kv_heads=", None),
        ("model.attention.position=none", "none"),
    ],
)
def test_argument_values(argument, value):
    name = argument.partition("=")[0]
    found = values(load([], [argument]).config)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.steps=3.7", "train.steps=3.7 must be an integer or null (argument train.steps=3.7)"),
        ("observe.every=true", "observe.every=true must be an integer (argument observe.every=true)"),
        ("train.lr=fast", "train.lr=fast must be a number (argument train.lr=fast)"),
        ("train.lr=.nan", "train.lr=nan must be a number (argument train.lr=.nan)"),
        ("train.lr=true", "train.lr=true must be a number (argument train.lr=true)"),
        ("train.lr='3'", "train.lr='3' must be a number (argument train.lr='3')"),
        ("train.lr=", "train.lr=null must be a number (argument train.lr=)"),
        ("run.dir=3", "run.dir=3 must be a string; put it in quotes to make it a string (argument run.dir=3)"),
        ("train.compile=yes", "train.compile='yes' must be auto, true or false (argument train.compile=yes)"),
        ("train.compile=1", "train.compile=1 must be auto, true or false (argument train.compile=1)"),
        ("train.betas=[0.9]", "train.betas=[0.9] must be a list of 2 numbers (argument train.betas=[0.9])"),
        (
            "engine.kind=zero9",
            "engine.kind=zero9 must be auto, single, ddp, fsdp2, hsdp, zero1, zero2 or zero3 "
            "(argument engine.kind=zero9)",
        ),
        ("data.path=[1]", "data.path=[1] must be a string or a list of strings (argument data.path=[1])"),
        (
            "model=pre_ln",
            "model=pre_ln must be a section, a mapping of keys such as model.method (argument model=pre_ln)",
        ),
        (
            "data.validation=x",
            "data.validation=x must be a mapping of names to a string or a list of strings "
            "(argument data.validation=x)",
        ),
        ("model.lr=3", "unknown key model.lr, did you mean train.lr? (argument model.lr=3)"),
        ("model.n_layres=3", "unknown key model.n_layres, did you mean model.n_layers? (argument model.n_layres=3)"),
        ("trian.lr=3", "unknown key trian.lr, did you mean train.lr? (argument trian.lr=3)"),
        ("zzz.qqq=3", "unknown key zzz.qqq; see docs/configuration.md (argument zzz.qqq=3)"),
        ("train.lr.x=3", "unknown key train.lr.x, did you mean train.lr? (argument train.lr.x=3)"),
        ("a.yaml", "argument a.yaml must have the form key.path=value; a file is given by --config FILE"),
        ("=3", "argument =3 must have the form key.path=value; a file is given by --config FILE"),
    ],
)
def test_wrong_arguments(argument, message):
    assert problems([], [argument]) == [message]


def test_an_unreadable_value_is_told():
    (line,) = problems([], ["data.path=[a"])
    assert line.startswith("argument data.path=[a cannot be read: not valid YAML")
    assert line.endswith("quote the value")


def test_every_problem_is_told_with_its_line(tmp_path):
    given = file(tmp_path, "train:\n  lr: fast\n  compile: on\nmodel:\n\n  lr: 3\ntrian: {lr: 1, steps: 2}\n")
    assert problems([given], ["train.steps=x"]) == [
        f"train.lr=fast must be a number ({given}:2)",
        f"train.compile='on' must be auto, true or false ({given}:3)",
        f"unknown key model.lr, did you mean train.lr? ({given}:6)",
        f"unknown key trian.lr, did you mean train.lr? ({given}:7)",
        f"unknown key trian.steps, did you mean train.steps? ({given}:7)",
        "train.steps=x must be an integer or null (argument train.steps=x)",
    ]


def test_a_wrong_value_that_is_overridden_is_no_problem(tmp_path):
    assert load([file(tmp_path, "train: {lr: fast}")], ["train.lr=1"]).config.train.lr == 1


def test_a_scalar_for_a_section_does_not_hide_other_problems(tmp_path):
    given = file(tmp_path, "model: {n_layers: x}\n")
    found = problems([given], ["model=3", "model.d_model=8"])
    assert any(line.startswith("model=3 must be a section") for line in found)
    assert any(line.startswith("model.n_layers=x must be") for line in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "{}:1: a configuration file must be a mapping of sections to keys"),
        ("\n3\n", "{}:2: a configuration file must be a mapping of sections to keys"),
        ("train:\n  lr: 1\n  lr: 2\n", "{}:3: lr is given twice, first in line 2"),
        ("train: {lr: 1}\ntrain: {steps: 2}\n", "{}:2: train is given twice, first in line 1"),
        ("train: {lr: 1}\ntrain.lr: 2\n", "{0}:2: train.lr is given twice, first in {0}:1"),
        (
            "train:\n  lr: !!python/object:os.system 1\n",
            "{}:2: the tag tag:yaml.org,2002:python/object:os.system is not supported",
        ),
        ("train:\n  lr: !!float fast\n", "{}:2: 'fast' does not fit its tag tag:yaml.org,2002:float"),
        ("a: &a\n  b: *a\n", "{}: nested too deeply, or a mapping that contains itself"),
        ("[a]: 3\n", "{}:1: a name must be a string, not a list or mapping"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    given = file(tmp_path, content)
    assert problems([given], []) == [message.format(given)]


def test_broken_yaml_names_its_line(tmp_path):
    given = file(tmp_path, "train:\n  lr: [1\nmodel: 3\n")
    (line,) = problems([given], [])
    assert line.startswith(f"{given}:3: not valid YAML: ")


def test_a_character_that_yaml_forbids(tmp_path):
    given = file(tmp_path, "train:\n  lr: '\x00'\n")
    assert problems([given], []) == [f"{given}:2: not valid YAML: special characters are not allowed"]


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    missing = tmp_path / "missing.yaml"
    assert problems([str(missing), str(tmp_path), str(binary)], []) == [
        f"--config {missing} cannot be read: No such file or directory; name an existing YAML file",
        f"--config {tmp_path} cannot be read: Is a directory; name an existing YAML file",
        f"--config {binary} is not UTF-8 text; name a YAML file",
    ]


def test_origins(tmp_path):
    given = file(tmp_path, "train:\n  lr: 1\n  steps: 3\ndata: {validation: {x: y}}\n")
    assert load([given], ["train.lr=2e-4"]).origins == {
        "train.lr": "argument train.lr=2e-4",
        "train.steps": f"{given}:3",
        "data.validation.x": f"{given}:4",
    }


@pytest.mark.parametrize("name", list(keys()))
def test_a_dropped_letter_finds_its_key(name):
    section, _, last = name.rpartition(".")
    if len(last) > 3:
        assert nearest(f"{section}.{last[:-2]}{last[-1]}") == name


WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMED = WORDS.filter(lambda name: "$" not in name and not name.startswith("~"))
PATHS = st.one_of(NAMED, st.lists(NAMED, max_size=3))
NAMES = st.text("abcXYZ019_-", min_size=1, max_size=5)


@settings(deadline=None)  # a busy machine is no error
@given(
    column=WORDS,
    limit=st.one_of(st.none(), WORDS, st.floats(allow_nan=False, allow_infinity=False)),
    path=PATHS,
    sets=st.dictionaries(NAMES, PATHS, max_size=3),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    betas=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    tokens=st.one_of(st.none(), st.integers(-(2**70), 2**70)),
    compiled=st.booleans(),
)
def test_what_is_dumped_loads_as_the_same(column, limit, path, sets, lr, betas, tokens, compiled):
    config = Config()
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, time_limit=limit),
        data=dataclasses.replace(config.data, text_column=column, path=path, validation=sets),
        train=dataclasses.replace(config.train, lr=lr, betas=betas, tokens=tokens, compile=compiled),
    )
    assert _load_text(dump(config)) == config


def _load_text(content: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content.encode())
        return load([str(path)], []).config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)  # a busy machine is no error
@given(JSON)
def test_yaml_reads_what_it_wrote(value):
    assert text.plain(text.read(text.write({"v": value}))) == {"v": value}


@settings(deadline=None)  # a busy machine is no error
@given(st.lists(st.text("abc*/.:-_ 0123456789", min_size=1, max_size=12), min_size=1, max_size=3))
def test_lists_of_paths_as_arguments(paths):
    quoted = ", ".join(f"'{path}'" for path in paths)
    assert load([], [f"data.path=[{quoted}]"]).config.data.path == paths


@settings(deadline=None)  # a busy machine is no error
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_can_be_an_argument(value):
    assert load([], [f"train.lr={value!r}"]).config.train.lr == value


@pytest.mark.parametrize(
    "words", ["on", "yes", "3e-4", "1:30", "2026-01-01", "null", "~", "", " a", "0x10", "1_000", "é"]
)
def test_words_stay_words(words):
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, text_column=words))
    assert _load_text(dump(config)).data.text_column == words


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (90, 90),
        (1.5, 1.5),
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("01:30", 90),
        ("1:30:05", 5405),
        ("2-01:00:00", 176400),
    ],
)
def test_durations(value, seconds):
    assert parse_duration(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "-5", -5, 0, "1:2:3:4", "10x", "1-10", float("inf")])
def test_no_durations(value):
    with pytest.raises(ConfigError, match=r"run\.time_limit=.* is not a length of time above zero; write seconds"):
        parse_duration(value)


def test_loading_imports_no_torch_and_is_quick():
    program = (
        "import sys, time; t = time.process_time(); from stablelm.config.load import load; load([], ['train.lr=1']);"
        "assert 'torch' not in sys.modules; print(time.process_time() - t)"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    assert min(seconds) < 0.5
