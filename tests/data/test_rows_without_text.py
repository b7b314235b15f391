"""Rows without a document: they do not exist for lanes, packing or counts, whatever their period in the file."""

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, write_rows
from support.prepared import write_shards

from stablelm.config.schema import DataConfig
from stablelm.data import inspection
from stablelm.data.formats.file_rows import SharedFiles
from stablelm.data.loader import Loader
from stablelm.data.order import Order, TextLane
from stablelm.data.shards import shard_files, shard_format
from stablelm.data.shards.shard_reader import TokenShard
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LANES = 8


def loader(files: list[str], packing: str = "split", **data) -> Loader:
    config = DataConfig(seq_len=32, lanes=LANES, workers=0, packing=packing, retry_budget=0, **data)  # type: ignore[arg-type]
    return Loader(files, LetterTokenizer(), config, seed=3, global_batch_size=LANES, documents=True)


def documents_of_lanes(files: list[str], **options) -> list[int]:
    """Documents that each lane finds in the first epoch."""
    reading = ReadOptions(retry_budget=0, **options)
    order = Order(files, seed=3, lanes=LANES, shuffle_block=64)
    shared = SharedFiles(len(files), options=reading)
    lanes = [TextLane(order, lane, order.start(lane), shared, options=reading).documents() for lane in range(LANES)]
    return [sum(1 for _ in itertools.takewhile(lambda found: found[0].epoch == 0, lane)) for lane in lanes]


def is_a_multiple_of_seven(row: dict) -> bool:
    return int(row["text"].split()[1]) % 7 == 0


@pytest.mark.parametrize("every", range(2, 17))
def test_no_period_of_empty_rows_starves_a_lane(tmp_path: Path, every: int):
    texts = [f"row {n} of 960" if n % every == 0 else "" for n in range(960)]
    counts = documents_of_lanes([write_rows(tmp_path / "a.json", texts)])
    assert sum(counts) == sum(map(bool, texts))
    assert min(counts) > 0


def test_no_period_of_filtered_rows_starves_a_lane(tmp_path: Path):
    files = [write_rows(tmp_path / "a.json", [f"row {n} of 960" for n in range(960)])]
    counts = documents_of_lanes(files, filter=f"{__name__}:is_a_multiple_of_seven")
    assert sum(counts) == 138 and min(counts) > 0


@quick
@given(st.lists(st.sampled_from(["", "some", "text", "cut"]), min_size=1, max_size=60), st.integers(1, 6))
def test_every_document_comes_once_an_epoch_and_nothing_else(tmp_path_factory, kinds, block):
    folder = tmp_path_factory.mktemp("corpus")
    texts = {n: f"{kind}{n}" for n, kind in enumerate(kinds) if kind in ("some", "text")}
    lines = [
        '{"text": "cut' if kind == "cut" else json.dumps({"text": texts.get(n, "")}) for n, kind in enumerate(kinds)
    ]
    (folder / "a.json").write_text("\n".join(lines) + "\n")
    reading = ReadOptions(retry_budget=0, bad_rows="skip")
    order = Order([str(folder / "a.json")], seed=1, lanes=3, shuffle_block=block)
    shared, seen = SharedFiles(1, options=reading), []
    for lane in range(3):
        found = TextLane(order, lane, order.start(lane), shared, options=reading).documents()
        with contextlib.suppress(DataError):  # of so few documents some lanes may get none
            seen += [text for _, text in itertools.takewhile(lambda each: each[0].epoch == 0, found)]
    assert sorted(seen) == sorted(texts.values())


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("prepared", [False, True])
def test_windows_hold_no_trace_of_rows_without_text(tmp_path: Path, packing: str, prepared: bool):
    with_gaps = [f"row {n} of 960" if n % 2 else "" for n in range(960)]
    files = [write_rows(tmp_path / "a.json", with_gaps)]
    each = loader(write_shards(files, tmp_path / "p") if prepared else files, packing)
    for _ in range(20):
        batch = each.next()
        assert batch.documents is not None
        for tokens, numbers in zip(batch.tokens.numpy(), batch.documents.numpy(), strict=True):
            text = tokens[numbers < numbers[-1]] if packing == "best_fit" else tokens
            assert not ((text[1:] == 0) & (text[:-1] == 0)).any(), "two ends of documents in a row"


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_text_and_shards_agree_whatever_is_missing(tmp_path: Path, packing: str):
    texts = ["" if n % 3 == 1 else f"{n} " + "x" * (n % 40) for n in range(300)]
    files = [write_rows(tmp_path / "a.json", texts), write_rows(tmp_path / "b.json.gz", texts[::-1])]
    text, shards = loader(files, packing), loader(write_shards(files, tmp_path / "p"), packing)
    for _ in range(30):
        assert np.array_equal(text.next().tokens, shards.next().tokens)
        assert text.state() == shards.state()


@pytest.mark.parametrize("prepared", [False, True])
def test_checks_count_documents_and_not_rows(tmp_path: Path, prepared: bool):
    files = [write_rows(tmp_path / "a.json", ["some text", "", "", "more text", ""])]
    checks = shard_files if prepared else inspection
    files = write_shards(files, tmp_path / "p") if prepared else files
    checks.check_lanes(files, 2)
    with pytest.raises(ConfigError, match=r"take 3 documents from each, but .* holds 2; set at most 2 lanes"):
        checks.check_lanes(files, 3)


def test_prepared_rows_keep_their_numbers(tmp_path: Path):
    files = [write_rows(tmp_path / "a.json", ["some", "", "text"])]
    (path,) = write_shards(files, tmp_path / "p")
    shard = TokenShard(path, tokenizer=None, options=ReadOptions())
    rows = shard.take(np.array([2, 0, 1]))
    assert (rows.ends - rows.begins).tolist() == [5, 5, 0]
    assert shard.count() == (10, 2)


def test_shards_that_hold_the_end_of_empty_documents_give_the_same_text(tmp_path: Path):
    texts = ["" if n % 3 == 1 else f"{n} some text" for n in range(90)]
    files = [write_rows(tmp_path / "a.json", texts)]
    (tmp_path / "p").mkdir()
    with (tmp_path / "p" / "a.json.tokens").open("wb") as file:
        rows = [(np.array([*map(ord, text), 0], np.int32), len(text)) for text in texts]
        named = {"source": "a.json", "source_size": 1, "tokenizer": "letters", "pieces": 1 << 16, "eos": 0}
        shard_format.write(file, iter(rows), **named)
    text, shards = loader(files), loader([str(tmp_path / "p" / "a.json.tokens")])
    for _ in range(20):
        assert np.array_equal(text.next().tokens, shards.next().tokens)
        assert text.state() == shards.state()
