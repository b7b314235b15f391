"""Lists of remote files are kept in the run directory, so that a resume sees the same files and asks no store."""

import json
import uuid
from typing import Any

import fsspec
import pytest
from support.letters import LetterTokenizer, write_corpus

from stablelm.config.load import load
from stablelm.data.storage import stores
from stablelm.train.prepare import files_to_keep, find_corpora, known_files


class Letters(LetterTokenizer):
    sha256 = "letters"


LETTERS: Any = Letters()


@pytest.fixture
def folder():
    """A folder of the store that lives in this process, with two files."""
    store, name = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    for index in range(2):
        store.pipe_file(f"{name}/train-{index}.json", b'{"text": "words"}\n')
    store.pipe_file(f"{name}/validation.json", b'{"text": "words"}\n')
    return name


def config(tmp_path, *changes: str):
    return load([], [f"run.dir={tmp_path}", "train.steps=1", *changes]).config


def names(files: list[str]) -> list[str]:
    return [file.rsplit("/", 1)[-1] for file in files]


def test_a_resume_keeps_its_files_and_another_path_is_looked_up(tmp_path, folder, monkeypatch):
    asked = []
    real = stores.glob
    monkeypatch.setattr(stores, "glob", lambda pattern, options: asked.append(pattern) or real(pattern, options))
    first = config(tmp_path, f"data.path={folder}/train-*", f"data.validation.own={folder}/valid*")
    found = find_corpora(first, LETTERS)
    assert names(found.train[""]) == ["train-0.json", "train-1.json"]
    assert known_files(first) == {}
    kept = files_to_keep(first, found)
    (tmp_path / "data_files.json").write_text(json.dumps(kept))
    fsspec.filesystem("memory").pipe_file(f"{folder}/train-2.json", b'{"text": "more"}\n')
    asked.clear()
    again = find_corpora(first, LETTERS)
    assert (again.train, again.validation) == (found.train, found.validation)
    assert asked == []
    other = config(tmp_path, f"data.path={folder}/tr*", f"data.validation.own={folder}/valid*")
    assert names(find_corpora(other, LETTERS).train[""]) == ["train-0.json", "train-1.json", "train-2.json"]
    assert asked == [f"{folder}/tr*"]
    (tmp_path / "data_files.json").write_text("damaged")
    assert names(find_corpora(first, LETTERS).train[""]) == ["train-0.json", "train-1.json", "train-2.json"]


def test_local_files_are_looked_up_each_time(tmp_path):
    (path,) = write_corpus(tmp_path, [400])
    given = config(tmp_path / "run", f"data.path={path}", "data.lanes=4", "train.global_batch_size=4", "data.seq_len=8")
    assert files_to_keep(given, find_corpora(given, LETTERS)) == {}
