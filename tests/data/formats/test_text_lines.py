"""Reading lines: formats, edge cases of files, and every kind of bad day below the decompressor."""

import errno
import gzip
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from support.httpserver import serve

from stablelm.data.formats.text_lines import lines_from
from stablelm.data.storage import range_file, retry
from stablelm.data.storage.options import ReadOptions, base_name, local_path
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError

# Random letters compress little, so the files stay long enough to be cut in the middle.
LINES = [bytes(random.Random(n).choices(b"abcdefghijklmnopqrstuvwxyz", k=60)) for n in range(4000)]
PLAIN = b"\n".join(LINES) + b"\n"


@pytest.fixture
def quick_retries(monkeypatch):
    """Quick retries."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.05)


def lines(path: Path | str, budget: float = 10.0) -> list[bytes]:
    return list(open_lines(str(path), budget))


def open_lines(url: str, budget: float) -> Iterator[bytes]:
    return (line for _, line in lines_from(url, 0, ReadOptions(block=16 << 10, retry_budget=budget))[1])


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", bytes),
        ("a.jsonl", bytes),
        ("a.json.gz", gzip.compress),
        ("a.json.gz", lambda data: gzip.compress(data[:7001]) + gzip.compress(data[7001:]) + b"\0" * 600),
        ("a.json.zst", zstandard.compress),
        ("a.json.zst", lambda data: zstandard.compress(data[:7001]) + zstandard.compress(data[7001:])),
    ],
    ids=["json", "jsonl", "gzip", "gzip members and padding", "zstd", "zstd frames"],
)
def test_every_format_gives_the_same_lines(tmp_path, name, pack):
    assert lines(write(tmp_path / name, pack(PLAIN))) == LINES


@pytest.mark.parametrize("slice_bytes", [1, 2, 3, 7, 64])
def test_line_ends_and_byte_order_mark_at_every_chunk_border(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(range_file, "LOCAL_BLOCK", slice_bytes)
    path = write(tmp_path / "a.json", b"\xef\xbb\xbfone\n\n  \r\ntwo\r\n\xef\xbb\xbfthree\n\nlast, no newline")
    expected = [(1, b"one"), (4, b"two\r"), (5, b"\xef\xbb\xbfthree"), (7, b"last, no newline")]
    assert list(lines_from(str(path), 0, ReadOptions(block=16 << 10, retry_budget=0))[1]) == expected


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_files_without_a_line(tmp_path, data):
    assert lines(write(tmp_path / "a.json", data)) == []
    assert lines(write(tmp_path / "a.json.gz", gzip.compress(data))) == []


def test_byte_order_mark_of_an_only_line(tmp_path):
    assert lines(write(tmp_path / "a.json", b"\xef\xbb\xbfone")) == [b"one"]


def test_a_file_url_is_a_local_path(tmp_path):
    path = write(tmp_path / "a.json", PLAIN)
    assert lines(f"file://{path}") == LINES
    assert local_path("s3://bucket/a.json") is None


def test_names_do_not_depend_on_the_store():
    assert base_name("/data/en/a.json.gz") == base_name("https://host/en/a.json.gz?download=true") == "a.json.gz"


@pytest.mark.parametrize(("name", "pack"), [("a.json.gz", gzip.compress), ("a.json.zst", zstandard.compress)])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_files_name_the_file_and_the_place(tmp_path, name, pack, kept):
    packed = pack(PLAIN)
    path = write(tmp_path / name, packed[: int(len(packed) * kept)])
    with pytest.raises(DataError, match=rf"{path}: truncated, it ends at byte {path.stat().st_size} "):
        lines(path)


@pytest.mark.parametrize(("name", "pack"), [("a.json.gz", gzip.compress), ("a.json.zst", zstandard.compress)])
def test_damaged_files_name_the_file(tmp_path, name, pack):
    packed = bytearray(pack(PLAIN))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    path = write(tmp_path / name, bytes(packed))
    with pytest.raises(DataError, match=f"{path}: damaged near byte"):
        lines(path)


def test_a_missing_local_file_fails_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(DataError, match=r"absent\.json: the file no longer exists"):
        lines(tmp_path / "absent.json", budget=60)
    assert time.monotonic() - began < 5


def test_a_passing_local_fault_is_retried_and_a_shrunken_file_is_not(tmp_path, monkeypatch, quick_retries):
    path, stale, real = write(tmp_path / "a.json", PLAIN), [], range_file.open_file

    class Stale:
        """Of one of two opened files the handle becomes stale."""

        def __init__(self, file):
            self.file, self.good = file, len(stale) % 2
            stale.append(self)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size):
            if not self.good and self.file.tell():
                raise OSError(errno.ESTALE, "Stale file handle")
            return self.file.read(size)

        def close(self):
            raise OSError("closing fails too")

    def opening(url, options):
        file, stamp = real(url, options)
        return Stale(file), stamp

    monkeypatch.setattr(range_file, "open_file", opening)
    options = ReadOptions(block=16 << 10, retry_budget=5)
    assert RangeFile(str(path), options).readall() == PLAIN
    assert len(stale) == 2
    file = RangeFile(str(path), options)
    file.read(1000)
    write(path, PLAIN[:-5])
    with pytest.raises(DataError, match="changed from 244000 to 243995 bytes"):
        file.readall()


def test_too_many_open_files_is_said(tmp_path, monkeypatch):
    def refuse(url, options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(range_file, "open_file", refuse)
    with pytest.raises(DataError, match=r"too many open files; use fewer data\.lanes"):
        lines(tmp_path / "a.json", budget=60)


@pytest.mark.parametrize(("name", "pack"), [("a.json.gz", gzip.compress), ("a.json", bytes)])
def test_cut_connections_and_server_errors_lose_nothing(tmp_path, quick_retries, name, pack):
    write(tmp_path / name, pack(PLAIN))
    with serve(tmp_path) as server:
        server.cuts = 5
        stream = open_lines(f"{server.url}/{name}", 10)
        got = [next(stream) for _ in range(500)]
        server.failures = 3
        got += [next(stream) for _ in range(500)]
        server.failures, server.status = 3, 429
        got += stream
        assert got == LINES
        assert (server.cuts, server.failures) == (0, 0)


def test_an_outage_within_the_budget_is_waited_for(tmp_path, quick_retries):
    write(tmp_path / "a.json.gz", gzip.compress(PLAIN))
    with serve(tmp_path) as server:
        stream = open_lines(f"{server.url}/a.json.gz", 20)
        got = [next(stream) for _ in range(500)]
        server.down = True
        threading.Timer(0.7, lambda: setattr(server, "down", False)).start()
        assert got + list(stream) == LINES


def test_the_first_request_is_retried_as_well(tmp_path, quick_retries):
    write(tmp_path / "a.json.gz", gzip.compress(PLAIN))
    with serve(tmp_path) as server:
        server.failures = 4
        assert lines(f"{server.url}/a.json.gz") == LINES


def test_a_spent_budget_names_file_place_and_key(tmp_path, quick_retries):
    write(tmp_path / "a.json.gz", gzip.compress(PLAIN))
    with serve(tmp_path) as server:
        stream = open_lines(f"{server.url}/a.json.gz", 0.5)
        next(stream)
        server.down = True
        began = time.monotonic()
        with pytest.raises(DataError, match=r"a\.json\.gz: unreadable at byte \d+ for 0\.5 s .*data\.retry_budget"):
            list(stream)
        assert 0.4 < time.monotonic() - began < 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_answer_that_will_not_change_is_not_retried(tmp_path, quick_retries, status):
    with serve(tmp_path) as server:
        server.failures, server.status = 100, status
        began = time.monotonic()
        with pytest.raises(DataError, match=rf"a\.json\.gz: the server answers {status}"):
            lines(f"{server.url}/a.json.gz", budget=60)
        assert time.monotonic() - began < 5


def test_a_file_that_vanishes_or_changes_on_the_server(tmp_path, quick_retries):
    path = write(tmp_path / "a.json", PLAIN)
    with serve(tmp_path) as server:
        stream = open_lines(f"{server.url}/a.json", 20)
        next(stream)
        write(path, PLAIN + PLAIN)
        server.failures = 1
        with pytest.raises(DataError, match="changed from 244000 to 488000 bytes"):
            list(stream)
        stream = open_lines(f"{server.url}/a.json", 20)
        next(stream)
        path.unlink()
        with pytest.raises(DataError, match=r"a\.json: the server answers 404"):
            list(stream)


def test_a_server_without_ranges_is_refused_clearly(tmp_path, quick_retries):
    write(tmp_path / "a.json.gz", gzip.compress(PLAIN))
    with serve(tmp_path) as server:
        server.ranges = False
        with pytest.raises(DataError, match=r"does not serve parts of a file .*; download the files"):
            lines(f"{server.url}/a.json.gz", budget=60)
