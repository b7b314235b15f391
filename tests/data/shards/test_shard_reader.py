"""Prepared shards: what is written is read, anywhere it lies; damage is told; a mask is the same as no tokens."""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.httpserver import serve
from support.letters import LetterTokenizer, write_corpus, write_rows
from support.prepared import write_shard, write_shards

from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.data.shards import shard_files, shard_format, shard_reader
from stablelm.data.shards.shard_reader import TokenShard
from stablelm.data.storage import retry
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError
from stablelm.tokenizers.interface import document_tokens


def open_shard(url: str, tokenizer: str | None = "letters") -> TokenShard:
    return TokenShard(url, tokenizer=tokenizer, options=ReadOptions(retry_budget=0))


def rows_of(shard: TokenShard, wanted: range) -> list[list[int]]:
    rows = shard.take(wanted)
    return [shard.join(rows.begins[n : n + 1], rows.ends[n : n + 1]).tolist() for n in range(len(rows))]


def loader(files: list[str], **data) -> Loader:
    config = DataConfig(seq_len=16, lanes=6, shuffle_block=4, **{"workers": 0, "retry_budget": 0.2, **data})
    return Loader(files, LetterTokenizer(), config, seed=5, global_batch_size=6)


def batches(each: Loader, count: int) -> list:
    return [(batch.tokens.tolist(), batch.targets.tolist()) for batch in (each.next() for _ in range(count))]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(max_codepoint=60_000, categories=["L"]), max_size=9), max_size=30),
    first=st.integers(0, 31),
    step=st.integers(1, 5),
    masked=st.sets(st.integers(0, 29)),
)
def test_rows_are_the_documents(tmp_path_factory, texts, first, step, masked):
    folder = tmp_path_factory.mktemp("shard")
    left_out = tuple(row for row in masked if row < len(texts))
    shard = open_shard(write_shard(write_rows(folder / "a.json", texts), folder, left_out))
    wanted = range(first, min(first + 20, len(texts)), step)
    expected = [document_tokens(LetterTokenizer(), text).tolist() for text in texts]
    assert [bool(tokens) for tokens in expected] == [bool(text) for text in texts]
    expected = [[] if row in left_out else tokens for row, tokens in enumerate(expected)]
    assert rows_of(shard, wanted) == [expected[row] for row in wanted]
    assert shard.count() == (sum(map(len, expected)), sum(map(bool, expected)))
    assert shard.footer.text_bytes == sum(len(text.encode()) for text in texts)
    shard.check()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 25))
def test_parts_cover_rows_in_order_and_keep_to_the_limit(lengths, limit):
    ends = np.cumsum(lengths)

    class Counted:
        def join(self, begins, ends):
            return np.concatenate([np.arange(*span) for span in zip(begins, ends, strict=True)])

    rows = shard_reader.ShardRows(Counted(), ends - lengths, ends)  # type: ignore[arg-type]
    seen, next_row = [], 0
    for first, tokens, row_ends in rows.parts(limit):
        assert first == next_row and row_ends[-1] == len(tokens)
        assert len(tokens) <= limit or len(row_ends) == 1
        next_row += len(row_ends)
        seen += tokens.tolist()
    assert next_row == len(lengths)
    assert seen == list(range(ends[-1]))


@pytest.mark.parametrize(("pieces", "kind"), [(65_535, "<u2"), (65_536, "<u4")])
def test_tokens_take_as_few_bytes_as_the_vocabulary_allows(tmp_path, pieces, kind):
    path = tmp_path / "a.json.tokens"
    rows = [np.array([1, 2, pieces - 1], np.int32), np.array([7, 0], np.int32)]
    with path.open("wb") as file:
        named = {"source": "a.json", "source_size": 1, "tokenizer": "t", "pieces": pieces, "eos": 0}
        shard_format.write(file, ((row, 0) for row in rows), **named)
    shard = open_shard(str(path), "t")
    assert rows_of(shard, range(2)) == [[1, 2, pieces - 1], [7, 0]]
    assert shard.join(np.array([0]), np.array([1])).dtype == kind
    content = path.read_bytes()
    assert np.frombuffer(content[: 4 * np.dtype(kind).itemsize], kind).tolist() == [1, 2, pieces - 1, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_moves_between_text_and_shards_at_any_step(tmp_path, workers):
    files = write_corpus(tmp_path, [40, 0, 33, 61])
    prepared = write_shards(files, tmp_path / "prepared")
    whole = batches(loader(files), 40)
    each, got = loader(files), []
    for turn in range(8):
        got += batches(each, 5)
        state = json.loads(json.dumps(each.state()))
        each.close()
        each = loader(prepared if turn % 2 == 0 else files, workers=workers)
        each.load(state)
    each.close()
    assert got == whole


def test_a_document_longer_than_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr("stablelm.data.order.PART", 50)
    files = [write_rows(tmp_path / "a.json", ["a" * n for n in (3, 200, 0, 30, 30, 49, 50, 51)] * 3)]
    assert batches(loader(files), 20) == batches(loader(write_shards(files, tmp_path / "p")), 20)


@pytest.mark.parametrize("page", [64, 1 << 20])
def test_remote_shards_are_read_by_ranges_and_survive_cuts(tmp_path, monkeypatch, page):
    monkeypatch.setattr(shard_reader, "SMALLEST", page)
    monkeypatch.setattr(shard_reader, "LARGEST", page)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    files = write_corpus(tmp_path, [40, 33])
    local = write_shards(files, tmp_path)
    bits = np.zeros(40, bool)
    bits[::3] = True
    Path(shard_format.mask_url(local[0])).write_bytes(np.packbits(bits, bitorder="little").tobytes())
    with serve(tmp_path) as server:
        urls = [f"{server.url}/{Path(path).name}" for path in local]
        server.cuts, server.cut_after = 3, 20
        remote = loader(urls, workers=1, retry_budget=5)
        assert batches(remote, 12) == batches(loader(local), 12)
        remote.close()
        assert server.cuts == 0


def test_a_store_that_does_not_tell_of_a_mask_is_an_error(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [9]), tmp_path)
    with serve(tmp_path) as server:
        url = f"{server.url}/{Path(path).name}"
        assert shard_reader.read_mask(url, options=ReadOptions(retry_budget=0)) is None
        server.failures, server.status = 1000, 403
        with pytest.raises(DataError, match=r"part-00000\.json\.mask: the server answers 403"):
            shard_reader.read_mask(url, options=ReadOptions(retry_budget=0))


def test_a_masked_row_is_left_out_and_the_state_still_fits(tmp_path):
    files = write_corpus(tmp_path, [40, 33])
    shards_of = write_shards(files, tmp_path / "p")
    each = loader(shards_of)
    batches(each, 6)
    state = each.state()
    write_shard(files[0], tmp_path / "p", masked=tuple(range(0, 40, 2)))
    masked = loader(shards_of)
    masked.load(state)
    seen = "".join(chr(token) for batch, _ in batches(masked, 40) for row in batch for token in row)
    assert "0:13" in seen and "1:12" in seen and "0:12" not in seen


def test_all_rows_masked_is_an_error_and_no_endless_search(tmp_path):
    files = write_corpus(tmp_path, [12])
    path = write_shard(files[0], tmp_path / "p", masked=tuple(range(12)))
    with pytest.raises(DataError, match=r"has no document in its share"):
        loader([path]).next()


def test_a_missing_row_is_a_changed_file(tmp_path):
    (path,) = write_shards([write_rows(tmp_path / "a.json", ["abc"] * 40)], tmp_path)
    each = loader([path])
    batches(each, 4)
    state = each.state()
    write_shards([write_rows(tmp_path / "a.json", ["abc"] * 3)], tmp_path)
    again = loader([path])
    again.load(state)
    with pytest.raises(DataError, match=r"a\.json\.tokens: changed since the checkpoint"):
        again.next()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: data[:-1], "not a complete file"),
        (lambda data: data[8:], "not a complete file"),
        (lambda data: data[:10], "not a complete file"),
        (lambda data: data.replace(b'"version": 2', b'"version": 9'), "has format version 9"),
        (lambda data: data.replace(b'"letters"', b'"another"'), "another tokenizer"),
        (lambda data: data.replace(b'"rows": 9', b'"rows": 8'), "not a complete file"),
    ],
)
def test_damage_is_told_when_a_shard_is_opened(tmp_path, damage, says):
    (path,) = write_shards(write_corpus(tmp_path, [9]), tmp_path)
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(DataError, match=rf"part-00000\.json\.tokens: .*{says}.*stablelm prepare"):
        open_shard(path)


def read_all(path: str) -> list[list[int]]:
    shard = open_shard(path)
    return rows_of(shard, range(shard.footer.rows))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_anywhere_is_found_when_it_is_read(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(shard_format, "BLOCK", 256)
    monkeypatch.setattr(shard_reader, "BLOCK", 256)
    (path,) = write_shards(write_corpus(tmp_path, [60]), tmp_path)
    data, draw = Path(path).read_bytes(), random.Random(seed)
    expected = read_all(path)
    for position in draw.sample(range(len(data)), 60):
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        Path(path).write_bytes(flipped)
        found = rows_or_error(path)
        if found == expected:  # of the footer, some is only told
            assert position > open_shard(path).footer.start
        else:
            assert "stablelm prepare" in str(found), found


def rows_or_error(path: str) -> list[list[int]] | str:
    try:
        return read_all(path)
    except DataError as error:
        return str(error)


def test_what_is_not_read_is_not_checked(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [4000]), tmp_path)
    shard = open_shard(path)
    assert shard.footer.index > 2 * shard_format.BLOCK
    data = bytearray(Path(path).read_bytes())
    data[shard_format.BLOCK] ^= 1
    Path(path).write_bytes(data)
    shard = open_shard(path)
    assert len(rows_of(shard, range(10))) == 10
    with pytest.raises(DataError, match=r"damaged between the bytes 65536 and 131072; make it again"):
        rows_of(shard, range(shard.footer.rows))


def without_checksums(path: str) -> None:
    """Makes a shard one of the first version."""
    data, footer = Path(path).read_bytes(), open_shard(path).footer
    kept = data[: footer.sums]
    words = json.dumps({**asdict(footer), "version": 1, "sha256": hashlib.sha256(kept).hexdigest()}).encode()
    Path(path).write_bytes(kept + words + shard_format.TAIL.pack(len(words), shard_format.MAGIC))


def test_shards_without_checksums_are_read_and_get_them(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [90]), tmp_path)
    data, rows = Path(path).read_bytes(), read_all(path)
    without_checksums(path)
    assert read_all(path) == rows
    old = open_shard(path)
    old.check()
    with open(tmp_path / "new", "wb") as file:
        assert shard_format.add_checksums(file, old.parts(), old.footer).version == shard_format.VERSION
    assert (tmp_path / "new").read_bytes() == data


def test_a_token_beyond_the_vocabulary_is_an_error(tmp_path):
    path = tmp_path / "a.json.tokens"
    with path.open("wb") as file:
        named = {"source": "a.json", "source_size": 1, "tokenizer": "letters", "pieces": 32, "eos": 0}
        shard_format.write(file, [(np.array([1, 31, 0]), 0), (np.array([32, 0]), 0)], **named)
    assert rows_of(open_shard(str(path)), range(1)) == [[1, 31, 0]]
    with pytest.raises(DataError, match="holds the token 32 of a vocabulary of 32"):
        rows_of(open_shard(str(path)), range(2))


def test_a_changed_byte_is_found_by_the_hash(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [9]), tmp_path)
    data = bytearray(Path(path).read_bytes())
    data[5] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(DataError, match="another hash"):
        open_shard(path).check()


def test_a_shard_cut_short_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [90]), tmp_path)
    shard = open_shard(path)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="changed while it was read"):
        shard.take(range(50, 60))


def test_a_mask_of_another_size_is_an_error(tmp_path):
    (path,) = write_shards(write_corpus(tmp_path, [9]), tmp_path)
    Path(shard_format.mask_url(path)).write_bytes(b"\0")
    with pytest.raises(DataError, match=r"part-00000\.json\.mask: 1 bytes, which does not fit the 9 rows"):
        open_shard(path)


def test_the_state_of_1024_lanes_is_small(tmp_path):
    prepared = write_shards([write_rows(tmp_path / f"{n:03}.json", ["ab" * 50] * 600) for n in range(2)], tmp_path)
    config = DataConfig(seq_len=64, lanes=1024, shuffle_block=64, workers=0)
    each = Loader(prepared, LetterTokenizer(), config, seed=1, global_batch_size=1024)
    each.next()
    state = each.state()
    assert len(state["lanes"]) == 1024
    # The largest numbers a run meets: a thousand epochs, a million entries, blocks and tokens into a document.
    wide = {lane: [999, 999_999, 999_999, 63, 999_999] for lane in state["lanes"]}
    assert len(json.dumps({**state, "lanes": wide})) < 64 << 10


def test_every_shard_that_is_wrong_is_named(tmp_path):
    files = write_shards(write_corpus(tmp_path, [9, 9, 9, 9]), tmp_path / "p")
    for path in (files[1], files[3]):
        Path(path).write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        shard_files.check(files, "letters", key="data.path")
    lines = str(caught.value).splitlines()
    assert [line.partition(": it")[0].split(": ")[1] for line in lines] == [files[1], files[3]]
    assert all(line.startswith("data.path: ") and "it is empty" in line for line in lines)


@pytest.mark.parametrize("form", ["{0}/*.tokens", "{0}/{{one,two,good}}.tokens", "list"])
def test_shards_that_are_no_files_are_all_named(tmp_path, form):
    (tmp_path / "good.tokens").write_bytes(b"x")
    (tmp_path / "one.tokens").symlink_to("gone")
    (tmp_path / "two.tokens").mkdir()
    path = [f"{tmp_path}/{name}.tokens" for name in ("good", "one", "two")] if form == "list" else form.format(tmp_path)
    with pytest.raises(ConfigError) as caught:
        shard_files.resolve(path, key="data.path", options=ReadOptions(retry_budget=0))
    said = str(caught.value)
    assert "one.tokens' (a link to 'gone', which does not exist)" in said and "two.tokens' (a folder)" in said
    assert "good.tokens'" not in said.replace("{one,two,good}", "")
