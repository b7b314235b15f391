"""A web server with every fault we know in random order: each document once and in order, or DataError (77)."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_stores import TEXTS
from support.httpserver import FaultyServer, serve
from support.range_faults import FAULTS, well

from stablelm.data.formats.file_rows import documents
from stablelm.data.storage import retry, stores
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError

BLOCK, EACH = 8 << 10, 500


def redirect(to: str) -> Callable[[FaultyServer], None]:
    """Every answer is a redirect to this address, after the file's name."""

    def put(server: FaultyServer) -> None:
        name = server.requests[-1].split()[1].lstrip("/").split("?")[0]
        place = to.format(url=server.url, name=name)
        server.twist = lambda status, headers, body, asked: (302, {"Location": place, "Content-Length": "0"}, b"")

    return put


def put(**attributes: object) -> Callable[[FaultyServer], None]:
    def put(server: FaultyServer) -> None:
        vars(server).update(attributes)

    return put


PASSING = {
    "cut": put(cuts=1, cut_after=700),
    "reset": put(cuts=1, cut_after=0),
    "503": put(failures=1, status=503, failure_headers={}),
    "429": put(failures=1, status=429, failure_headers={"Retry-After": "0.01"}),
    "408": put(failures=1, status=408, failure_headers={}),
    "trickle": put(trickle=(512, 0.002)),
    "stall": put(trickle=(1, 0.001)),
    "moved": redirect("{url}/{name}?moved=1"),
}
"""After which reading goes on by itself."""
ENDING = {
    **FAULTS,
    "moved to another file": redirect("{url}/other"),
    "moved to no web server": redirect("ftp://127.0.0.1/{name}"),
    "404": put(failures=1, status=404, failure_headers={}),
    "412": put(failures=1, status=412, failure_headers={}),
    "416": put(failures=1, status=416, failure_headers={}),
}


def write(folder: Path, number: int, texts: list[str]) -> str:
    name = f"c4-train.{number:05d}.json.gz"
    lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts)
    (folder / name).write_bytes(gzip.compress(lines.encode(), mtime=0))
    return name


@pytest.mark.parametrize("seed", [1, 2])
def test_a_few_files(tmp_path, monkeypatch, seed):
    fuzz(tmp_path, monkeypatch, files=3, seed=seed)


@pytest.mark.slow
def test_ten_thousand_documents(tmp_path, monkeypatch):
    met = fuzz(tmp_path, monkeypatch, files=20, seed=3)
    assert set(met) == {*PASSING, *ENDING}


def fuzz(folder: Path, monkeypatch: pytest.MonkeyPatch, *, files: int, seed: int) -> Counter[str]:
    """Reads files of EACH documents, each anew after a failure until it was read to its end; counts the faults met."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.05)
    monkeypatch.setattr(stores, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(stores, "TRICKLE", 2048)
    draw, met = random.Random(seed), Counter[str]()
    texts = [TEXTS[start : start + EACH] for start in range(0, len(TEXTS), EACH)]
    names = [write(folder, number, texts[number % len(texts)]) for number in range(files)]
    (folder / "other").write_bytes((folder / names[0]).read_bytes()[::-1])
    faults, bag, said = {**PASSING, **ENDING}, [], []

    def before(request: str) -> None:
        well(server)
        if draw.random() < 0.3:
            if not bag:
                bag.extend(draw.sample(list(faults), len(faults)))
            met[name := bag.pop()] += 1
            faults[name](server)

    with serve(folder) as server:
        server.tags, server.before = True, before
        for number, name in enumerate(names):
            wanted = [f"{number} {text}" for text in texts[number % len(texts)]]
            got: list[str] = []
            while got != wanted:
                got = []
                try:
                    got.extend(documents([f"{server.url}/{name}"], ReadOptions(retry_budget=30, block=BLOCK)))
                except DataError as error:
                    said.append((name, str(error)))
                else:
                    assert len(got) == len(wanted), "an end that is none"
                assert got == wanted[: len(got)]
                assert len(said) < 50 * files
    assert len(said) > files / 2, "faults that reading survived only show the half"
    assert [(name, text) for name, text in said if name not in text] == []
    return met
