"""What of a checkpoint's configuration is believed: named key by key, and nothing that reaches outside."""

import os
import re
from pathlib import Path

import pytest

from stablelm.config.keys import assemble, choices, describe, is_mapping, keys, takes_text, value_type, values
from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.config.trust import LOCAL, METHOD, METHOD_OPTIONS, MOST, OPTIONS, VALUES, believed, excesses

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
COMPARED = {"data.text_column", "data.eos_token", "evaluate.average"}
"""Keys whose free text is only compared: with names in a row, tokens, or the averages that there are."""


def reaching(name: str) -> list:
    """Values of a key that would reach a store, run a function or open a device."""
    key, words = keys()[name], ["https://example.org/a", "s3://bucket/a", "zip://a::b", "/dev/zero", "/**/*.json"]
    words += [] if name in LOCAL else ["package.module:function"]  # which may be the name of a file
    if is_mapping(key.type):
        return [{entry: word} for entry in ("a", "a.path", "s3.endpoint_url") for word in words]
    return [*words, *([word] for word in words if "list" in describe(key.type))]


def test_the_lists_name_keys_that_exist():
    assert VALUES | {METHOD, METHOD_OPTIONS} | LOCAL | set(MOST) <= set(keys())
    assert not VALUES & ({METHOD, METHOD_OPTIONS} | LOCAL)


def test_every_part_of_the_model_is_believed():
    named = {name for name in keys() if name.startswith("model.") and not name.startswith(OPTIONS)}
    assert named <= VALUES | {METHOD, METHOD_OPTIONS}


@pytest.mark.parametrize("name", keys())
def test_no_key_that_takes_free_text_is_believed_with_what_reaches_outside(name: str):
    key = keys()[name]
    entry = "a" if is_mapping(key.type) else ""
    if choices(name) or not takes_text(value_type(key, entry)) or name in COMPARED:
        return
    assert name not in VALUES
    for value in reaching(name):
        found = believed(assemble({name: value}))
        assert values(found.config)[name] == key.default, value
        assert found.withheld


def test_a_key_that_is_not_named_has_its_default():
    told = {
        name: True
        for name, key in keys().items()
        if describe(key.type) == "true or false"
        and key.default is False
        and name not in VALUES
        and not name.startswith("model.")
    }
    assert {"run.allow_foreign_dir", "faults.allow"} <= set(told)
    found = believed(assemble(told))
    assert found.config == Config()
    assert dict(found.withheld) == told


def test_plain_files_of_this_machine_are_believed(tmp_path: Path):
    (tmp_path / "a.json").write_text("")
    os.mkfifo(tmp_path / "fifo")
    paths = ["embedded", str(tmp_path / "a.json"), str(tmp_path), f"{tmp_path}/*.json", "absent.json"]
    for path in paths:
        assert believed(assemble({"data.validation_path": path})).config.data.validation_path == path
    told = {"good": str(tmp_path / "a.json"), "bad": str(tmp_path / "fifo"), "list": [paths[1], "s3://a/b.json"]}
    found = believed(assemble({"data.validation": told}))
    assert found.config.data.validation == {"good": told["good"]}
    assert set(found.withheld) == {"data.validation.bad", "data.validation.list"}


def test_the_users_own_keys_win_but_for_the_model(tmp_path: Path):
    saved = assemble({"model.n_layers": 3, "data.filter": "a:b", "data.map": "c:d", "data.seq_len": 64})
    file = tmp_path / "own.yaml"
    file.write_text("model: {n_layers: 5}\ndata: {filter: null, cache: /c}\n")
    found = believed(saved).with_own(load([str(file)], []))
    assert (found.config.model.n_layers, found.config.data.cache, found.config.data.seq_len) == (3, "/c", 64)
    assert dict(found.withheld) == {"data.map": "c:d"}


def test_numbers_that_would_fill_the_memory_need_the_users_word():
    large = assemble({"data.seq_len": 1 << 30, "evaluate.batches": 1 << 40})
    assert [sentence.partition("=")[0] for sentence in excesses(large)] == ["data.seq_len", "evaluate.batches"]
    assert excesses(large, given=["data.seq_len", "evaluate.batches", "evaluate.micro_batch_size"]) == []
    assert "tokens at once" in excesses(assemble({"data.seq_len": 1 << 18}))[0]
    assert excesses(assemble({"data.seq_len": 1 << 17})) == []


def test_the_page_names_what_is_believed():
    text = PAGE.read_text()
    listed = text[text.index("Only these parts of its configuration are used") : text.index("The list is in")]
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", listed))
    assert named == {name for name in VALUES | LOCAL if not name.startswith("model.")}
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (PAGE.parent / link).exists(), link
