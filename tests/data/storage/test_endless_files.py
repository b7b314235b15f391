"""What has no end or gives no bytes: refused at once or after seconds, and never waited for."""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
from support.httpserver import serve
from support.programs import TINY, run
from support.tiny import TinyCorpus

from stablelm.checkpoint import manifest
from stablelm.data import inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.storage import options, stall_monitor
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

LINE = json.dumps({"text": "a document of some words"}).encode() + b"\n"


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    monkeypatch.setattr(options, "FIRST_ANSWER", 1.0)
    monkeypatch.setattr(options, "LONGEST_LOOK", 1.5)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.parquet"])
def test_a_fifo_or_device_among_the_text(tmp_path, name):
    fifo, device = tmp_path / name, tmp_path / f"device-{name}"
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    for path in (fifo, device):
        with pytest.raises(ConfigError, match=rf"data\.path: .*{name}.*not a regular file"):
            inspection.check([str(path)], key="data.path")
        with pytest.raises(DataError, match=rf"{name}.*not a regular file"):
            list(documents([str(path)], ReadOptions(retry_budget=60)))


@pytest.mark.parametrize("name", ["COMMITTED", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "too large"])
def test_a_checkpoints_small_files(tmp_path, name, kind):
    step = tmp_path / "step-00000001"
    step.mkdir()
    content = manifest.manifest_content({})
    commit = manifest.Commit(1, "1", 1, "2026-01-01T00:00:00", manifest.record_of(content).sha256)
    (step / "manifest.json").write_bytes(content)
    (step / "COMMITTED").write_bytes(manifest.commit_content(commit))
    assert manifest.verify(step) == []
    (step / name).unlink()
    if kind == "fifo":
        os.mkfifo(step / name)
    elif kind == "device":
        (step / name).symlink_to("/dev/zero")
    else:
        (step / name).touch()
        os.truncate(step / name, 1 << 40)
    [problem] = manifest.verify(step)
    assert name in problem
    assert ("larger than" if kind == "too large" else "not a regular file") in problem


@pytest.mark.parametrize("name", ["identity.json", "data_files.json", "summary.json", "provenance.json"])
def test_a_run_directory_with_a_fifo_in_it_holds_nothing_up(tiny_corpus: TinyCorpus, tmp_path: Path, name: str):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    line = (*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "train.steps=1")
    done = run("pretrain", *line, timeout=60)
    assert done.returncode in (0, 78), done.stderr
    assert "Traceback" not in done.stderr


def look(url: str) -> float:
    began = time.monotonic()
    inspection.check_remote([url], key="data.path", options=ReadOptions(retry_budget=60))
    return time.monotonic() - began


def test_a_server_that_trickles_before_the_start(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(LINE * 3, mtime=0))
    (tmp_path / "b.json").write_bytes(LINE * 40000)
    with serve(tmp_path) as server:
        server.trickle = (1, 0.2)
        with pytest.raises(ConfigError, match=r"path: .*a\.json\.gz: unreadable at byte 0 for 1 s \(no answer for 1"):
            look(f"{server.url}/a.json.gz")
        server.trickle = (4096, 0.02)  # slow, but text comes: the rest of a small file need not be looked at
        assert 1 < look(f"{server.url}/b.json") < 6


@pytest.mark.parametrize("content", [b"\n" * (4 << 20), b" " * (4 << 20)], ids=["newlines", "blanks"])
def test_a_slow_server_without_a_document(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with serve(tmp_path) as server:
        server.trickle = (16384, 0.05)
        with pytest.raises(ConfigError, match=r"a\.json: no document in its first \d+ bytes, and no time"):
            look(f"{server.url}/a.json")


def test_a_read_that_is_slow_is_said_like_one_that_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stall_monitor, "FIRST_LINE", 0.3)
    monkeypatch.setattr(stall_monitor, "NEXT_LINES", 0.5)
    (tmp_path / "a.json").write_bytes(LINE * 40)
    seen = []
    with serve(tmp_path) as server:
        server.trickle = (256, 0.2)
        url = f"{server.url}/a.json"

        def watch() -> None:
            for _ in range(15):
                seen.extend(stall_monitor.waiting())
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert len(list(documents([url], ReadOptions(retry_budget=60)))) == 40
        watcher.join()
    assert {(wait.file, wait.cause) for wait in seen} == {(url, "none, but the store is slow")}
    assert f"waiting for {url}: " in capfd.readouterr().err
    assert stall_monitor.waiting() == []
