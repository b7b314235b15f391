import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablelm.data import embedded, inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError
from stablelm.tokenizers import load_tokenizer

# A build of a hundredth of the size: what is under test here is how files come to be.
SMALL = """
import os, time
from stablelm.data import embedded
words = "one two three four five six seven eight nine ten eleven twelve".split()
def text(n):
    return " ".join(words[(n * 7 + k * k) % 12] for k in range(30)) + f" {n}"
def made():
    with open(os.environ["BUILDS"], "a") as log:
        log.write("x")
    time.sleep(float(os.environ.get("DELAY", 0)))
    return [embedded.Document(text(n), f"url/{n}") for n in range(400)]
embedded.stdlib_documents = made
embedded.PIECES = 290
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replaces the text of the standard library by 400 short documents; gives the file that counts builds."""
    builds = tmp_path / "builds"
    monkeypatch.setenv("BUILDS", str(builds))
    monkeypatch.setattr(embedded, "stdlib_documents", embedded.stdlib_documents)
    monkeypatch.setattr(embedded, "PIECES", embedded.PIECES)
    exec(SMALL, {})
    return builds


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    code = f"{SMALL}\nprint(embedded.embedded({str(cache)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def test_the_second_call_builds_nothing(small: Path, tmp_path: Path):
    first = embedded.embedded(str(tmp_path / "cache"))
    assert embedded.embedded(str(tmp_path / "cache")) == first
    assert small.read_text() == "x"


def test_files_are_in_the_form_of_c4(small: Path, tmp_path: Path):
    made = embedded.embedded(str(tmp_path / "cache"))
    names = [Path(path).name for path in made.train]
    assert len(names) == 8
    assert all(re.fullmatch(r"python-3\.\d+\.\d+\S*-[0-9a-f]{8}-train\.0000\d-of-00008\.json\.gz", n) for n in names)
    assert Path(made.validation[0]).name.endswith("-validation.00000-of-00001.json.gz")
    inspection.check([*made.train, *made.validation], key="data.path")
    texts = list(documents([*made.train, *made.validation], ReadOptions(retry_budget=0)))
    assert len(texts) == len(set(texts)) == 400
    line = gzip.decompress(Path(made.train[0]).read_bytes()).splitlines()[0]
    assert list(json.loads(line)) == ["text", "timestamp", "url"]
    assert b'": "' not in line
    assert load_tokenizer(made.tokenizer).pieces == 290
    # Every document is in one split, about one in twenty in validation, and the files are alike in length.
    assert 5 <= len(list(documents(made.validation, ReadOptions(retry_budget=0)))) <= 40
    lengths = [len(list(documents([path], ReadOptions(retry_budget=0)))) for path in made.train]
    assert max(lengths) - min(lengths) <= 1


def test_two_builds_give_the_same_bytes(small: Path, tmp_path: Path):
    contents = []
    for name in ("one", "two"):
        made = embedded.embedded(str(tmp_path / name))
        contents.append({Path(p).name: Path(p).read_bytes() for p in [*made.train, *made.validation, made.tokenizer]})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10


def test_processes_that_start_together_build_once(small: Path, tmp_path: Path):
    running = [start(tmp_path / "cache", DELAY="0.5") for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(answers) == 1
    assert small.read_text() == "x"


def test_a_killed_build_leaves_nothing_that_is_used(small: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    process = start(cache, DELAY="60")
    for _ in range(600):
        if small.exists() and small.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path for path in cache.iterdir() if path.is_dir()]  # its staging folder
    made = embedded.embedded(str(cache))
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert folders == [Path(made.tokenizer).parent]


def test_a_cache_that_cannot_be_made(small: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ConfigError) as caught:
        embedded.embedded(str(file / "cache"))
    says = f"data.cache: cannot write the embedded corpus to '{file}/cache' (Not a directory); give a folder"
    assert str(caught.value).startswith(says)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache(small: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    with pytest.raises(ConfigError, match=r"^data\.cache: cannot write .*Permission denied"):
        embedded.embedded(str(cache))


def test_a_finished_corpus_in_a_read_only_cache(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = embedded.embedded(str(tmp_path / "cache"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert embedded.embedded(str(tmp_path / "cache")) == first


def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"^data\.cache: .*No space left on device"):
        embedded.embedded(str(tmp_path / "cache"))
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_file_that_was_deleted(small: Path, tmp_path: Path):
    made = embedded.embedded(str(tmp_path / "cache"))
    Path(made.train[3]).unlink()
    with pytest.raises(ConfigError, match=r"^data\.cache: files are missing from .*; delete this folder"):
        embedded.embedded(str(tmp_path / "cache"))


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    empty = tmp_path / "lib"
    empty.mkdir()
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(empty))
    with pytest.raises(ConfigError, match=r"^data\.path: 'embedded' needs the sources of the standard library"):
        embedded.embedded(str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> embedded.EmbeddedCorpus:
    folder = tmp_path_factory.getbasetemp()
    # The workers of a parallel run share one build, which is locked.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return embedded.embedded(str(folder / "embedded"))


def long_paragraphs(files: list[str]) -> list[str]:
    paragraphs = (p for text in documents(files, ReadOptions(retry_budget=0)) for p in text.split("\n\n"))
    return [" ".join(p.split()) for p in paragraphs if len(" ".join(p.split())) >= 80]


def test_the_real_corpus(real: embedded.EmbeddedCorpus):
    training = list(documents(real.train, ReadOptions(retry_budget=0)))
    validation = list(documents(real.validation, ReadOptions(retry_budget=0)))
    assert sum(len(text.encode()) for text in training) > 1_500_000
    assert 0.02 < len(validation) / len(training) < 0.10
    assert min(map(len, training)) >= 200
    # No paragraph of some length is known from training.
    assert set(long_paragraphs(real.validation)).isdisjoint(long_paragraphs(real.train))
    # The default number of lanes works.
    inspection.check_lanes(real.train, 768)


def test_the_real_tokenizer(real: embedded.EmbeddedCorpus):
    tokenizer = load_tokenizer(real.tokenizer)
    assert tokenizer.pieces == 4096
    texts = list(documents(real.validation, ReadOptions(retry_budget=0)))
    tokens = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokens] == texts
    assert 3.0 < sum(len(text.encode()) for text in texts) / sum(map(len, tokens)) < 4.5
    assert max(max(ids) for ids in tokens) < 4096


def test_sources_are_parsed_not_imported_and_tests_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def source(path: str, word: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        methods = f'    def m(self):\n        """{word} method."""\n'
        inner = f'class A:\n    """{word} class. {"more of it " * 20}"""\n{methods}'
        file.write_text(f'"""{word} module."""\nraise SystemExit("imported")\nif True:\n    pass\n{inner}')

    source("beta.py", "Beta")
    source("alpha/__init__.py", "Alpha")
    source("test/gamma.py", "Gamma")
    source("site-packages/delta.py", "Delta")
    (tmp_path / "broken.py").write_text('"""Broken."""\nthis is no python\n')
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    found = {
        d.url: d.text for d in embedded.stdlib_documents() if not d.url.startswith(("pydoc:topics", "pydoc:builtins"))
    }
    assert list(found) == ["pydoc:beta#0", "pydoc:alpha#0"]
    text = found["pydoc:alpha#0"]
    assert text.startswith("alpha\nAlpha module.\n\nalpha.A\nAlpha class. more of it")
    assert text.endswith("alpha.A.m\nAlpha method.")
