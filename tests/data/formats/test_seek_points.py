"""Reading from the middle of a file: block starts inside gzip, members, frames, plain text; lost and wrong indexes."""

import gzip
import io
import os
import random
import re
import threading
import zlib
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.httpserver import serve

from stablelm.data.formats import seek_points
from stablelm.data.formats.file_rows import FileRows
from stablelm.data.formats.text_lines import lines_from
from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError

WORDS = [bytes(random.Random(n).choices(b"abcdefghijklmnop", k=n % 8 + 2)) for n in range(3000)]
LINES = [b" ".join(random.Random(n).choices(WORDS, k=60)) + b" %d" % n for n in range(4000)]
# Blank lines and an over-long one, so that rows, lines and pieces of text differ.
LINES[2000] = b" 2000" * 40_000
TEXT = b"\n".join(line + b"\n" * (n % 97 == 0) for n, line in enumerate(LINES))
ROWS = [(n, line) for n, line in enumerate(TEXT.split(b"\n"), 1) if line]
SPACING = 100_000


def with_name(data: bytes) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile("some-name.json", "wb", 6, packed) as file:
        file.write(data)
    return packed.getvalue()


def flushed(data: bytes) -> bytes:
    """As parallel compressors write: empty stored blocks between blocks, which end on whole bytes."""
    cuts = range(0, len(data), 100_000)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(data[at : at + 100_000]) + packer.flush(zlib.Z_FULL_FLUSH) for at in cuts]
    return b"".join(parts) + packer.flush()


def many(pack, data: bytes) -> bytes:
    return b"".join(pack(data[at : at + 70_001]) for at in range(0, len(data), 70_001))


PACKED = {
    "level-1.json.gz": lambda data: gzip.compress(data, 1),
    "level-6.json.gz": with_name,
    "level-9.json.gz": lambda data: gzip.compress(data, 9),
    "flushed.json.gz": flushed,
    "members.json.gz": lambda data: many(gzip.compress, data),
    "frames.json.zst": lambda data: many(zstandard.compress, data),
    "plain.jsonl": bytes,
}


@pytest.fixture(autouse=True)
def near_places(monkeypatch):
    monkeypatch.setattr(seek_points, "SPACING", SPACING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for name, pack in PACKED.items():
        (folder / name).write_bytes(pack(TEXT))
    return folder


def reading(cache, **options) -> ReadOptions:
    return ReadOptions(retry_budget=0, cache=str(cache), **options)


def index_file(cache):
    (path,) = (cache / "index").iterdir()
    return path


@pytest.mark.parametrize("name", PACKED)
def test_every_row_is_found_again_near_its_place(folder, tmp_path, name):
    url, options = str(folder / name), reading(tmp_path)
    assert list(lines_from(url, 0, options)[1]) == ROWS
    size = (folder / name).stat().st_size
    per_place = len(ROWS) * SPACING / size
    for row in [*range(0, len(ROWS), 333), 1999, 2000, 2001, len(ROWS) - 1, len(ROWS) + 5]:
        first, rows = lines_from(url, row, options)
        assert first <= row
        assert row - first < 3 * per_place + 200, "the next place before is not far"
        assert list(rows) == ROWS[first:]
    assert len({path.name for path in (tmp_path / "index").iterdir()}) == 1


@pytest.mark.parametrize("name", ["level-6.json.gz", "members.json.gz", "plain.jsonl"])
def test_an_index_grows_from_where_reading_stopped(folder, tmp_path, name):
    url, options = str(folder / name), reading(tmp_path)
    first, rows = 0, iter(())
    for until in range(300, 4000, 300):
        first, rows = lines_from(url, until, options)
        for _ in zip(range(first, until + 300), rows, strict=False):
            pass
    assert first > 3000
    whole = reading(tmp_path / "whole")
    list(lines_from(url, 0, whole)[1])
    found, expected = ({lines_from(url, row, each)[0] for row in range(0, len(ROWS), 20)} for each in (options, whole))
    # Not the same places, since the inflater's pieces begin elsewhere after a seek, but as near to one another.
    assert abs(len(found) - len(expected)) <= 1
    assert max(found) > 3000


def requested(server) -> int:
    """Bytes that were asked for."""
    ranges = (re.search(r"GET .* bytes=(\d+)-(\d+)", request) for request in server.requests)
    return sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)


def test_rows_of_a_file_are_taken_by_a_seek(folder, tmp_path):
    options = reading(tmp_path, block=1 << 12)
    with serve(folder) as server:
        url = f"{server.url}/level-6.json.gz"
        list(lines_from(url, 0, options)[1])
        for room in (0, 1 << 20):
            server.requests.clear()
            rows = FileRows(url, room=room, options=options)
            assert rows.take(range(3500, 3508, 2)) == [ROWS[row] for row in (3500, 3502, 3504, 3506)]
            assert requested(server) < 4 * SPACING
            assert rows.take(range(3508, 3510)) == ROWS[3508:3510]
    assert rows.take(range(3497, 3499)) == ROWS[3497:3499], "lanes a little behind share the pass"
    assert rows.take(range(10, 12)) is None


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "foreign", "gone"])
def test_a_damaged_index_is_built_again(folder, tmp_path, harm):
    url, options = str(folder / "level-6.json.gz"), reading(tmp_path)
    list(lines_from(url, 0, options)[1])
    path = index_file(tmp_path)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    bad = {"cut": good[:-100], "flipped": bytes(flipped), "emptied": b"", "foreign": b"PK" + good, "gone": b""}
    path.write_bytes(bad[harm])
    if harm == "gone":
        path.unlink()
    first, rows = lines_from(url, 3000, options)
    assert (first, list(rows)) == (0, ROWS)
    assert path.read_bytes() == good


def test_a_window_that_would_fill_the_memory_is_cut():
    assert len(seek_points.SeekPoint(0, 0, 0, 0, 0, 0, zlib.compress(bytes(1 << 28))).window) == 1 << 15


def test_an_index_with_forged_windows_is_built_again(folder, tmp_path):
    url, options = str(folder / "level-6.json.gz"), reading(tmp_path)
    list(lines_from(url, 0, options)[1])
    path = index_file(tmp_path)
    good = path.read_bytes()
    with RangeFile(url, options) as file:
        kept = seek_points.SeekIndex(options.cache, url, file.stamp())
    places = [place for place in map(kept.before, range(0, len(ROWS), 50)) if place is not None]
    for place in dict.fromkeys(places):
        kept.add(replace(place, packed=b"noise"))
    assert path.read_bytes() != good
    first, rows = lines_from(url, 3000, options)
    assert (first, list(rows)) == (0, ROWS)
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["level-6.json.gz", "members.json.gz", "frames.json.zst"])
def test_an_index_of_other_content_is_noticed_and_dropped(folder, tmp_path, name):
    """A store without times or tags, whose file was replaced by one of the same size between two runs."""
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes())
    status = path.stat()
    list(lines_from(str(path), 0, reading(tmp_path))[1])
    other = PACKED[name](b"\n".join(reversed(LINES)))
    path.write_bytes(other[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    first, rows = lines_from(str(path), 3000, reading(tmp_path))
    assert first == 0
    assert next(rows) == (1, LINES[-1])


def test_a_changed_file_has_another_index(folder, tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes((folder / "level-6.json.gz").read_bytes())
    list(lines_from(str(path), 0, reading(tmp_path))[1])
    path.write_bytes(gzip.compress(TEXT + b"\nmore\n"))
    first, rows = lines_from(str(path), 3000, reading(tmp_path))
    assert first == 0
    assert [line for _, line in rows][-1] == b"more"


def test_damage_behind_a_seek_is_found_by_the_checksum(folder, tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes((folder / "level-6.json.gz").read_bytes())
    status = path.stat()
    list(lines_from(str(path), 0, reading(tmp_path))[1])
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1  # of the checksum itself: all else inflates
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    first, rows = lines_from(str(path), 3000, reading(tmp_path))
    assert first > 0
    with pytest.raises(DataError, match="damaged near byte"):
        list(rows)


def test_a_cache_that_cannot_be_written_costs_nothing(folder, tmp_path):
    (tmp_path / "index").write_text("a file where the folder should be")
    assert list(lines_from(str(folder / "level-6.json.gz"), 0, reading(tmp_path))[1]) == ROWS


def test_many_readers_build_one_index(folder, tmp_path):
    url, got = str(folder / "level-9.json.gz"), {}

    def read(number):
        got[number] = list(lines_from(url, 0, reading(tmp_path))[1])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got[number] == ROWS for number in range(4))
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".index"]
    assert lines_from(url, 3900, reading(tmp_path))[0] > 2000


def test_a_remote_file_is_entered_by_ranges(folder, tmp_path):
    with serve(folder) as server:
        url = f"{server.url}/level-6.json.gz"
        options = reading(tmp_path, block=32 << 10)
        list(lines_from(url, 0, options)[1])
        server.requests.clear()
        first, rows = lines_from(url, 3900, options)
        assert next(rows) == ROWS[first]
        assert 3900 - first < 1000
        assert len(server.requests) <= 8


@settings(max_examples=10, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(0, 2**32))
def test_block_starts_of_any_level_and_alphabet(data, level, seed):
    letters = data.draw(st.binary(min_size=2, max_size=64))
    draw = random.Random(seed)
    text = bytes(draw.choices(letters, weights=[draw.random() for _ in letters], k=400_000))
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    packed = packer.compress(text) + packer.flush()
    inflater = zlib.decompressobj(-15)
    tail = inflater.decompress(packed[:30_000])
    part = packed[30_000:60_000]
    out = inflater.decompress(part)
    block = None if inflater.eof else seek_points.find_block(part, tail[-seek_points.WINDOW :], out)
    if block is None:
        return
    bit = 8 * 30_000 + block.bit
    again = seek_points.inflater_at(bit % 8, block.window)
    got = again.decompress(seek_points.padding(bit % 8, packed[bit // 8])) + again.decompress(packed[bit // 8 + 1 :])
    assert got == text[len(tail) + block.before :]


@pytest.mark.parametrize("bit", range(8))
def test_padding_is_text_of_nothing(bit):
    """Inflating goes on at every bit of a byte: here with a stored block, whose length the padding must not disturb."""
    stored = 0b001  # last block, stored
    inflater = seek_points.inflater_at(bit, b"")
    head = stored << bit
    data = seek_points.padding(bit, head & 255) + (bytes([head >> 8]) if bit > 5 else b"") + b"\5\0\xfa\xffhello"
    assert inflater.decompress(data) == b"hello"
    assert inflater.eof
