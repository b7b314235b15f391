"""Files of a pinned revision: read without the hub's API, its token kept to itself, its refusals told."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.fakehub import COMMIT, FORMER_NAME, FakeHub
from support.faulty_stores import BLOCK, CONTENT, NAME, TEXTS
from support.httpserver import serve
from support.samples import REPOSITORY

from stablelm.data.formats.file_rows import documents
from stablelm.data.storage import stall_monitor
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError

ODD = "en/words & more, 100%.json"
FILES = {NAME: CONTENT, ODD: b'{"text": "one"}\n', "en/empty.json": b""}
READ = """
import sys
from stablelm.data.storage.options import ReadOptions
from stablelm.data.formats.file_rows import documents
print(len(list(documents(sys.argv[1:], ReadOptions(retry_budget=5)))))
"""


def pinned(path: str) -> str:
    return f"hf://datasets/allenai/c4@{COMMIT}/{path}"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("default login somebody password secret\n")


@pytest.fixture(params=[False, True], ids=["by the hub", "redirected"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(dict(FILES), elsewhere=request.param) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def options(url: str, budget: float = 5.0) -> ReadOptions:
    return ReadOptions(retry_budget=budget, block=BLOCK, storage={"hf.endpoint": url})


def heads(hub: FakeHub) -> int:
    return sum(method == "HEAD" for method, _ in hub.requests)


def test_a_process_that_opens_a_pinned_file_calls_no_api(hub: FakeHub, tmp_path: Path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", READ, pinned(NAME), pinned(ODD)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{len(TEXTS) + 1}\n", "")
    assert hub.api_calls == []
    assert heads(hub) == 2


def test_any_range_at_one_head(hub: FakeHub):
    reading = options(hub.url)
    with RangeFile(pinned(NAME), reading) as file:
        assert file.stamp().size == len(CONTENT)
        for start in (5000, 0, len(CONTENT) - 10):
            file.seek(start)
            assert file.read(100) == CONTENT[start : start + 100]
        assert file.read(100) == b""
    with RangeFile(pinned(NAME), reading) as again:
        assert again.read(10) == CONTENT[:10]
    assert heads(hub) == 1
    with RangeFile(pinned("en/empty.json"), reading) as empty:
        assert empty.read(10) == b""
    assert hub.api_calls == []


def test_a_data_set_that_was_renamed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    hub.token = "hf_word"
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    url = pinned(NAME).replace("allenai/c4", FORMER_NAME)
    assert list(documents([url], options(hub.url))) == TEXTS
    assert hub.api_calls == []


def test_the_token_is_for_the_hub_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    hub.token = "hf_word"
    with pytest.raises(DataError, match=r"c4-train.*: the hub answers 401; accept .* set HF_TOKEN"):
        next(documents([pinned(NAME)], options(hub.url)))
    assert hub.credentials["hub"] == {None}, "what a netrc file says is not sent"
    hub.credentials["hub"].clear()
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    assert list(documents([pinned(NAME)], options(hub.url))) == TEXTS
    assert hub.credentials["hub"] == {"Bearer hf_word"}
    assert hub.credentials["elsewhere"] == ({None} if hub.elsewhere else set())


def test_no_token_where_the_environment_forbids_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert next(documents([pinned(NAME)], options(hub.url))) == TEXTS[0]
    assert hub.credentials["hub"] == {None}


@pytest.mark.parametrize("status", [429, 503])
def test_what_the_hub_asks_for_is_waited_for_and_seen(hub: FakeHub, status: int):
    with serve(upstream=hub.url) as server:
        seen: list[stall_monitor.Wait] = []
        server.before = lambda request: seen.extend(stall_monitor.waiting())
        server.failures, server.status, server.failure_headers = 2, status, {"Retry-After": "0.3"}
        before, began = stall_monitor.waited_seconds(), time.monotonic()
        assert list(documents([pinned(NAME)], options(server.url))) == TEXTS
        waited = time.monotonic() - began
    assert {wait.file for wait in seen} == {pinned(NAME)}
    assert {f"127.0.0.1 answers {status}" in wait.cause for wait in seen} == {True}
    assert waited > 0.6
    assert stall_monitor.waited_seconds() - before > 0.6


def test_a_signed_address_serves_until_it_has_run_out():
    with FakeHub(dict(FILES), elsewhere=True) as hub, RangeFile(pinned(NAME), options(hub.url)) as file:
        for start in range(0, 500, 100):
            file.seek(start)
            if start == 300:
                hub.failures = [403]
            assert file.read(100) == CONTENT[start : start + 100]
        assert sum(method == "GET" for method, _ in hub.requests) == 2


def test_a_signed_address_is_told_nowhere():
    with FakeHub(dict(FILES), elsewhere=True) as hub:
        hub.failures = [503] * 1000
        with pytest.raises(DataError, match=r"unreadable at byte 0 for 0.5 s \(127.0.0.1 answers 503 ") as caught:
            next(documents([pinned(NAME)], options(hub.url, budget=0.5)))
    assert 1 < 1000 - len(hub.failures) < 10
    assert "Signature" not in str(caught.value)


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"c4-train.*: HF_HUB_OFFLINE forbids .*; unset it, or give a folder"):
        next(documents([pinned(NAME)], options(hub.url)))
    assert hub.requests == []
