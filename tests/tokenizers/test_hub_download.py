"""Tokenizers of models on the hub, against a stand-in; in processes of their own, as its client reads its address at
import."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tokenizer_files
from support.fakehub import COMMIT, FakeHub
from support.samples import REPOSITORY

from stablelm.tokenizers import load_tokenizer
from stablelm.tokenizers.training import train

NAME = "someone/model"
LOAD = """
import json, sys
from stablelm.tokenizers import load_tokenizer
from stablelm.errors import UserError
answers = []
for name in sys.argv[1:]:
    try:
        found = load_tokenizer(name)
        answers.append({"sha256": found.sha256, "eos": found.eos, "files": sorted(found.files())})
    except UserError as error:
        answers.append({"error": str(error), "code": error.exit_code})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer_files.llama3(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|eot_id|>"}).encode(),
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "original/tokenizer.model": b"another form",
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(dict(files), name=NAME, kind="models") as hub:
        yield hub


def ask(folder: Path, endpoint: str, *names: str, **environment: str) -> list[dict]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_on_the_hub_by_its_forms_and_from_the_cache(hub: FakeHub, files: dict[str, bytes], tmp_path: Path):
    names = [NAME, f"hf://{NAME}", f"{NAME}@main", f"hf://{NAME}@{COMMIT}", f"hf://{NAME}@{COMMIT}/tokenizer.json"]
    answers = ask(tmp_path, hub.url, *names)
    local = load_tokenizer(
        tokenizer_files.write(tmp_path / "local", files["tokenizer.json"], tokenizer_config={"eos_token": "<|eot_id|>"})
    )
    kept = ["tokenizer.json", "tokenizer_config.json"]
    assert answers == [{"sha256": local.sha256, "eos": 303, "files": kept}] * len(names)
    fetched = {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"tokenizer.json", "tokenizer_config.json"}
    # Once it was fetched the hub is not needed.
    assert ask(tmp_path, "http://127.0.0.1:9", NAME, HF_HUB_OFFLINE="1") == answers[:1]
    assert ask(tmp_path, "http://127.0.0.1:9", f"hf://{NAME}") == answers[:1]


def test_a_local_folder_of_that_name_comes_first(hub: FakeHub, tmp_path: Path):
    tokenizer_files.write(tmp_path / NAME, tokenizer_files.gpt2())
    [answer] = ask(tmp_path, hub.url, NAME)
    assert answer["eos"] == 300 and not hub.requests


def test_mistakes_are_one_sentence(hub: FakeHub, tmp_path: Path):
    says = {
        "someone/other": "is neither here nor on the hub as you may see it; check owner and name, or set HF_TOKEN",
        f"{NAME}@v9": "has no such revision",
        f"hf://{NAME}/none.json": "has no such file",
        "hf://someone": "does not name a model on the hub; write hf://<owner>/<name>[@<revision>][/<file>]",
        "hf://datasets/allenai/c4": "does not name a model on the hub",
        "folder/mine.model": "does not exist; give the path of",
        "./folder/mine": "does not exist; give the path of",
    }
    for (name, words), answer in zip(says.items(), ask(tmp_path, hub.url, *says), strict=True):
        assert answer["code"] == 78 and answer["error"].startswith(f"data.tokenizer: {name!r} {words}")
        assert "\n" not in answer["error"]


def test_a_model_that_asks_for_a_token(hub: FakeHub, tmp_path: Path):
    hub.token = "hf_secret"
    refused, *_ = ask(tmp_path, hub.url, NAME)
    assert refused["code"] == 78 and "is gated; accept its licence on the hub and set HF_TOKEN" in refused["error"]
    [answer] = ask(tmp_path, hub.url, NAME, HF_TOKEN="hf_secret")
    assert answer["eos"] == 303


def test_a_hub_out_of_reach_and_models_with_two_tokenizers_or_none(hub: FakeHub, tmp_path: Path):
    [answer] = ask(tmp_path, "http://127.0.0.1:9", NAME)
    assert answer["code"] == 78 and "the hub does not answer for 'someone/model'" in answer["error"]
    hub.files["tokenizer.model"] = train(tokenizer_files.TEXT, vocab_size=300)
    both, one = ask(tmp_path, hub.url, NAME, f"hf://{NAME}@{COMMIT}/tokenizer.model")
    assert f"such as 'hf://{NAME}@{COMMIT}/tokenizer.model'" in both["error"]
    assert (one["eos"], one["files"]) == (1, ["tokenizer.model"])
    del hub.files["tokenizer.model"], hub.files["tokenizer.json"]
    [none] = ask(tmp_path, hub.url, NAME)
    assert "holds no tokenizer" in none["error"]
