"""A value on the command line means what was written: YAML where it is nothing but a value, else its own letters."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stablelm.config import text
from stablelm.config.keys import keys, takes_text, value_type, values
from stablelm.config.load import load
from stablelm.errors import ConfigError

WORD_KEYS = [key.name for key in keys().values() if takes_text(key.type)]
ENTRIES = ["data.validation.x", "data.mixture.x.path", "data.dataset.x", "data.storage.s3.x"]


def value_of(argument: str) -> object:
    name = argument.partition("=")[0]
    config = values(load([], [argument]).asked)
    if name in config:
        return config[name]
    parent = next(key for key in config if name.startswith(f"{key}."))
    return config[parent][name.removeprefix(f"{parent}.")]


@pytest.mark.parametrize("name", [*WORD_KEYS, *ENTRIES])
@pytest.mark.parametrize(
    "value",
    [
        "runs/a #b", "#b", "a # b # c", "&a b", "&a", "*x", "*.json.gz", "!tag x", "!!str 3", "!!float 3", "a: b", "a:",
        "? a", "- a", "-", "--- a", "...", "%YAML 1.2", "| a", "> a", "@a", "`a`", "{a,b}", "{a}", "{a,b}.json", "a]",
        "'a", '"a', "'a' b", "'a' #b", " a ", "a\nb", "a\n\nb", "a\tb", "a\\tb", "\ufeffa", "a, b", "a=b", "é #é",
    ],
)  # fmt: skip
def test_words_are_taken_as_they_are(name: str, value: str):
    assert value_of(f"{name}={value}") == value


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("data.path='a #b'", "a #b"),
        ('data.path="a\\tb"', "a\tb"),
        ("data.path=['a #b', c]", ["a #b", "c"]),
        ("data.path=[a, b,\n c]", ["a", "b", "c"]),
        ("data.validation.x=[a, b]", ["a", "b"]),
        ("run.init_from=null", None),
        ("run.init_from=", None),
        ("run.time_limit=90", 90.0),
        ("run.dir='null'", "null"),
        ("run.dir='3'", "3"),
        ("data.storage.s3={anon: true}", True),
        ("data.mixture.x={path: a}", "a"),
    ],
)
def test_yaml_is_read(argument: str, value: object):
    name = {"data.storage.s3": "data.storage.s3.anon", "data.mixture.x": "data.mixture.x.path"}
    key = argument.partition("=")[0]
    config = values(load([], [argument]).asked)
    asked = name.get(key, key)
    parent = asked if asked in config else ".".join(asked.split(".")[:2])
    found = config[parent] if parent == asked else config[parent][asked.removeprefix(f"{parent}.")]
    assert found == value


@pytest.mark.parametrize("value", ["3 # three", "&a 3", "!!int 3", "--- 3", "%YAML 1.2", "| 3"])
def test_a_number_has_nothing_beside_it(value: str):
    with pytest.raises(ConfigError, match=r"train\.steps"):
        load([], [f"train.steps={value}"])


def test_a_list_that_cannot_be_read_is_told():
    for name in ("data.path", "data.validation.x"):
        with pytest.raises(ConfigError, match="not valid YAML"):
            load([], [f"{name}=[a, b"])


def test_bytes_that_are_no_text_are_told():
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load([], ["run.dir=a\udcff"])


MARKS = st.text("ab #&*!:-[]{},'\"|>%@~.\n")
LETTERS = st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="\0")), MARKS)


@settings(deadline=None)  # a busy machine is no error
@given(st.sampled_from([*WORD_KEYS, *ENTRIES]), LETTERS)
@example("run.dir", "a\u2028b")
def test_nothing_is_lost_or_changed(name: str, value: str):
    """A key of words has the words, or what YAML reads where that is a list, another kind of value or in quotes."""
    try:
        found = value_of(f"{name}={value}")
    except (ConfigError, KeyError):
        return  # refused, or a mapping of entries: not another text
    if isinstance(found, str) and found != value:
        assert value.strip()[:1] in ("'", '"') and value.strip()[-1:] == value.strip()[:1]
        assert text.plain(text.read(value)) == found
    if isinstance(found, list):
        assert value.strip()[:1] == "[" and value.strip()[-1:] == "]"


@settings(deadline=None)  # a busy machine is no error
@given(st.sampled_from(WORD_KEYS), LETTERS)
def test_quotes_around_it_give_any_words(name: str, value: str):
    if value.isprintable() and "$" not in value and not value.startswith("~"):
        assert value_of("{}='{}'".format(name, value.replace("'", "''"))) == value


def test_every_key_of_words_is_tried():
    assert "run.dir" in WORD_KEYS and "model.method" in WORD_KEYS and "train.lr" not in WORD_KEYS
    assert value_type(keys()["data.validation"], "x") is not None
