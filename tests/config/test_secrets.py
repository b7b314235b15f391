"""Credentials: refused in a configuration with what to set instead, and taken out of whatever is printed or written."""

import json
from pathlib import Path

import pytest
import yaml

from stablelm.config.keys import choices, keys
from stablelm.config.load import load
from stablelm.config.rules import check
from stablelm.errors import ConfigError, DataError
from stablelm.methods.catalogue import METHODS
from stablelm.redaction import redacted

REFUSED = {
    "data.storage.http.client_kwargs.auth=hush-hush": "NETRC",
    "data.storage.http.headers.Cookie=hush-hush": "FSSPEC_HTTP",
    "data.storage.http.headers.Authorization=Basic hush-hush": "NETRC",
    "data.storage.https.headers.X-Api-Key=hush-hush": "FSSPEC_HTTP",
    "data.storage.https.client_kwargs.headers.X-Custom=hush-hush": "FSSPEC_HTTP",
    "data.storage.s3.endpoint_url=http://KEY:hush-hush@host:1": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "data.storage.s3.client_kwargs.endpoint_url=http://hush-hush@host:1": "AWS_SECRET_ACCESS_KEY",
    "data.storage.az.sas_token=hush-hush": "AZURE_STORAGE_ACCOUNT_KEY",
    "data.path=https://somebody:hush-hush@host/a.json.gz": "NETRC",
    "data.path=[https://host/a.json.gz, 'https://host/b.json.gz?token=hush-hush']": "NETRC",
    "data.path=https://host/a.json.gz?X-Amz-Signature=hush-hush&X-Amz-Date=1": "AWS_SECRET_ACCESS_KEY",
    "data.path=https://host/a.json.gz?sv=2020&sig=hush-hush": "NETRC",
    "data.path=https://host/a.json.gz?unknown=hush-hush0123456789": "NETRC",
    "data.validation_path=https://host/hf_hushhushhushhushhush/a.json.gz": "NETRC",
    "checkpoint.dir=s3://KEY:hush-hush@bucket/run": "AWS_ACCESS_KEY_ID",
}


@pytest.mark.parametrize(("argument", "variable"), REFUSED.items(), ids=REFUSED)
def test_a_secret_in_a_configuration(argument, variable):
    loaded = load([], [argument])
    with pytest.raises(ConfigError, match="secrets do not belong in a configuration") as caught:
        check(loaded.config, 1, None, loaded.origins)
    text = str(caught.value)
    assert text.startswith(argument.partition("=")[0])
    assert f"{variable}" in text
    assert "in the environment" in text
    assert "hush" not in text


def test_a_secret_of_a_kind_that_no_option_takes(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("data: {storage: {http.client_kwargs.auth: [somebody, hush-hush]}}")
    with pytest.raises(ConfigError, match=r"client_kwargs\.auth=\*\*\* must be") as caught:
        load([str(file)], [])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        "data.storage.http.headers.User-Agent=me/1.0",
        "data.storage.s3.endpoint_url=http://host:1",
        "data.storage.s3.anon=true",
        "data.path=hf://datasets/allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/*.json.gz",
        "data.path=https://host/a.json.gz?download=true&version=12",
        "run.dir=runs/secret-of-depth/token-study",
        "data.path=/data/password-hashes.jsonl.gz",
    ],
)
def test_what_is_none(argument):
    check(load([], [argument, "train.steps=1"]).config, 1, None)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:hush1hush2hush3@host/a.gz: answers 403", "https://***@host/a.gz: answers 403"),
        ("at https://h/a?X-Amz-Date=1&X-Amz-Signature=hush1", "at https://h/a?X-Amz-Date=***&X-Amz-Signature=***"),
        ("https://h/a?part=2&k=hush1hush2hush3hush4", "https://h/a?part=2&k=***"),
        ('{"Authorization": "Bearer hush1hush2"}', '{"Authorization": "***"}'),
        ("Cookie: a=hush1; b=hush2\nnext line", "Cookie: ***\nnext line"),
        ("argument data.storage.s3.secret=hush1", "argument data.storage.s3.secret=***"),
        ("auth=[me, hush1]", "auth=***"),
        ("the token hf_hush1hush2hush3hush4 is old", "the token *** is old"),
        ("AKIAHUSH1HUSH2HUSH3X", "***"),
        ("-----BEGIN PRIVATE KEY-----\nhush1\n-----END PRIVATE KEY-----", "***"),
        ("what-the-environment-holds-hush1 it is", "*** it is"),
        ("in a header of fsspec: hush1-in-json", "in a header of fsspec: ***"),
    ],
)
def test_what_is_taken_out(monkeypatch, text, kept):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "what-the-environment-holds-hush1")
    monkeypatch.setenv("FSSPEC_HTTP", '{"client_kwargs": {"headers": {"X-Mine": "hush1-in-json"}}}')
    assert redacted(text) == kept
    assert redacted(kept) == kept
    assert str(DataError(text)) == kept


@pytest.mark.parametrize(
    "text",
    [
        "made with another tokenizer (sha256 0123456789ab...); set data.tokenizer=a.model",
        "data.seq_len=32 train.tokens=1000 model.sigma.gamma=one",
        "data.eos_token='<|end-of-text-1|>', bos_token: <s>",
        "data:\n  eos_token: <|end-of-text-1|>\n",
        '{"data.eos_token": "<|end-of-text-1|>"}',
        "hf://datasets/allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/a.json.gz",
        "datasets://allenai/c4?revision=1588ec454efa1a09f29cd18ddd04fe05fc8653a2&split=train",
        "https://host/a.json.gz?download=true&versionId=3sL4kqtJlcpXroDTDmJ9rmSpXd3dIbrHY",
        "s3://bucket/a@b/c.json.gz: changed from 10 to 12 bytes while it was read",
    ],
)
def test_what_is_left(text):
    assert redacted(text) == text


def test_no_value_of_a_key_is_taken_for_the_name_of_a_secret():
    """What runs are made of is written as JSON and YAML, in mappings and lists, and typed as arguments."""
    values = sorted({value for name in keys() for value in choices(name)} | set(METHODS))
    assert {"sas", "sas_p", "adamw", "alibi"} <= set(values)
    for value in values:
        point = {"model.method": value, "depth": "24", "tried": [value, "another", value]}
        for text in (
            json.dumps(point),
            json.dumps(point, indent=1),
            yaml.safe_dump(point),
            f"model.method={value} a=b",
        ):
            assert redacted(text) == text


@pytest.mark.parametrize("pair", ['{"kind": "token", "then": "word"}', '{"a": ["auth", {"signature": 3}]}'])
def test_a_value_is_not_the_name_of_the_next_key(pair: str):
    assert redacted(pair) == pair


PAIRS = ['("Authorization", "hush1")', "[('token', 'hush1'), ('a', 'b')]", "('sas', '?sv=1&sig=hush1')"]


@pytest.mark.parametrize("text", PAIRS)
def test_pairs_of_names_and_secrets(text: str):
    assert "hush" not in redacted(text)
