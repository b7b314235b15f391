"""Best-fit packing: every token but a document's first predicted once, none across borders, exact resume."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, given_chunks, write_corpus, write_rows
from support.prepared import write_shard, write_shards

from stablelm.config.schema import DataConfig
from stablelm.data.loader import Loader
from stablelm.data.order import Cursor, TokenChunk
from stablelm.data.packing import BestFitPacker, fit
from stablelm.errors import DataError
from stablelm.model.targets import IGNORED

LENGTHS = st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=4)


def blocks(lengths: list[list[int]], first: int = 0):
    """Blocks of documents of these lengths, again and again; each token is a number of its own, eos is 0."""
    for turn in itertools.count(first):
        number = turn % len(lengths)
        start = 1 + sum(map(sum, lengths[:number]))
        parts = [np.arange(start, start + sum(lengths[number]), dtype=np.int32)]
        ends = np.cumsum(lengths[number], dtype=np.int64)
        tokens = np.concatenate(parts)
        tokens[ends - 1] = 0
        yield TokenChunk(Cursor(turn // len(lengths), 0, number, 0, 0), tokens, ends)


def loader(files: list[str], *, documents: bool = False, **data) -> Loader:
    config = DataConfig(
        seq_len=24, lanes=6, shuffle_block=4, **{"packing": "best_fit", "workers": 0, "retry_budget": 0, **data}
    )
    return Loader(files, LetterTokenizer(), config, seed=5, global_batch_size=6, documents=documents)


def batches(each: Loader, count: int) -> list:
    return [(batch.tokens.tolist(), batch.targets.tolist()) for batch in (each.next() for _ in range(count))]


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_bins_hold_each_item_once_and_are_not_overfull(lengths, size):
    bins = fit(lengths, size)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= size for items in bins)
    # Best fit never opens a bin for an item that had room in another: two bins are never both half empty.
    assert sum(2 * sum(lengths[item] for item in items) <= size for items in bins) <= 1


def test_an_item_goes_where_it_fits_best():
    # 7 and 6 open bins; 4 fits only beside 6 (0 left), 3 only beside 7.
    assert fit([3, 6, 4, 7], 10) == [[0, 3], [1, 2]]
    assert fit([5, 5, 5], 10) == [[0, 1], [2]]


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_each_token_but_a_documents_first_is_predicted_once(lengths, seq_len):
    if max([length for block in lengths for length in block], default=0) < 2:
        return
    packer = BestFitPacker(given_chunks(blocks(lengths)), seq_len, 0, Cursor(0, 0, 0, 0, 0))
    predicted: Counter[int] = Counter()
    eos = 0
    while True:
        window = packer.next_window()
        assert len(window) == seq_len + 1
        if packer.position.cursor().epoch:
            break
        assert (window[packer.filled :] == 0).all()
        kept = np.ones(seq_len, bool)
        kept[packer.borders - 1] = False
        kept[packer.filled - 1 :] = False
        inputs, targets = window[:-1][kept], window[1:][kept]
        # Within a document each token is one more than the one before.
        assert all(target in (0, given + 1) for given, target in zip(inputs, targets, strict=True))
        assert 0 not in inputs
        predicted.update(targets[targets > 0].tolist())
        eos += int((targets == 0).sum())
    expected, start = [], 1
    for length in (length for block in lengths for length in block):
        expected += range(start + 1, start + length - 1)
        start += length
    assert sorted(predicted.elements()) == expected
    assert eos == sum(length > 1 for block in lengths for length in block)


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30), st.integers(0, 25))
def test_the_cursor_is_all_the_state(lengths, seq_len, steps):
    if max([length for block in lengths for length in block], default=0) < 2:
        return
    whole = BestFitPacker(given_chunks(blocks(lengths)), seq_len, 0, Cursor(0, 0, 0, 0, 0))
    for _ in range(steps):
        whole.next_window()
    cursor = whole.position.cursor()
    turn = cursor.epoch * len(lengths) + cursor.block
    again = BestFitPacker(given_chunks(blocks(lengths, turn)), seq_len, 0, cursor)
    for _ in range(6):
        assert again.next_window().tolist() == whole.next_window().tolist()
        assert again.position.cursor() == whole.position.cursor()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_moves_between_text_and_shards_at_any_step(tmp_path, workers):
    files = write_corpus(tmp_path, [40, 0, 33, 61])
    prepared = write_shards(files, tmp_path / "prepared")
    whole = batches(loader(files), 40)
    each, got = loader(files), []
    for turn in range(10):
        got += batches(each, 4)
        state = json.loads(json.dumps(each.state()))
        assert all(cursor[4] == 0 for cursor in state["lanes"].values())
        each.close()
        each = loader(prepared if turn % 2 == 0 else files, workers=workers)
        each.load(state)
    each.close()
    assert got == whole


def test_a_block_that_became_shorter_is_a_changed_file(tmp_path):
    files = [write_rows(tmp_path / "a.json", ["a" * 23] * 24)]
    path = write_shard(files[0], tmp_path / "p")
    each = loader([path])
    batches(each, 3)
    state = each.state()
    write_shard(files[0], tmp_path / "p", masked=tuple(range(22)))
    again = loader([path])
    again.load(state)
    with pytest.raises(DataError, match="it changed since the checkpoint"):
        again.next()


def test_empty_documents_only_are_an_error_and_no_endless_search(tmp_path):
    files = [write_rows(tmp_path / "a.json", [""] * 24)]
    for paths in (files, write_shards(files, tmp_path)):
        with pytest.raises(DataError, match="has no document in its share"):
            loader(paths).next()


def test_targets_and_document_numbers_of_a_batch(tmp_path):
    files = [write_rows(tmp_path / "a.json", ["abcdefgh", "ABC"] * 12)]
    each = loader(files, documents=True)
    batch = each.next()
    assert batch.documents is not None and batch.documents.shape == batch.tokens.shape
    for tokens, targets, numbers in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        # Two of nine tokens and one of four, or one and three: 22 or 21 of 25 are text.
        text = (targets != IGNORED).nonzero().flatten()
        assert (targets[text] == tokens.roll(-1)[text]).all()
        assert (numbers[1:] - numbers[:-1]).min() >= 0 and numbers[0] == 0
        for number in numbers.unique():
            place = (numbers == number).nonzero().flatten()
            letters = "".join(map(chr, tokens[place].tolist()))
            assert letters in ("abcdefgh\0", "ABC\0") or set(letters) == {"\0"}
            assert targets[place[-1]] == IGNORED
    padded = 25 - ((batch.targets != IGNORED).sum(1) + batch.documents.max(1).values)
    assert each.padding_share == pytest.approx(float(padded.sum()) / batch.targets.numel() * 24 / 25)


def test_document_numbers_of_joined_documents(tmp_path):
    files = write_corpus(tmp_path, [40, 33])
    for paths in (files, write_shards(files, tmp_path / "p")):
        each = loader(paths, documents=True, packing="split")
        for _ in range(20):
            batch = each.next()
            after_eos = (batch.tokens == 0).roll(1, 1)
            after_eos[:, 0] = False
            assert batch.documents is not None
            assert (batch.documents == after_eos.cumsum(1)).all()
        assert each.padding_share == 0
    assert loader(files).next().documents is None
