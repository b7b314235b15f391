"""The order of documents: every row once an epoch, the same wherever the files lie, from any place on."""

import itertools
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.letters import write_corpus, write_rows

from stablelm.data.formats import file_rows
from stablelm.data.formats.file_rows import SharedFiles
from stablelm.data.order import Cursor, Order, TextLane, permutation
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_lane(order: Order, lane: int, start: Cursor | None = None, shared: SharedFiles | None = None):
    shared = shared or SharedFiles(len(order.files), options=ReadOptions(retry_budget=0))
    return TextLane(order, lane, start or order.start(lane), shared, options=ReadOptions(retry_budget=0)).documents()


def read_epoch(order: Order, epoch: int, limit: int = 1000):
    """(cursor, text) of all lanes in an epoch."""
    shared = SharedFiles(len(order.files), options=ReadOptions(retry_budget=0))
    for lane in range(order.lanes):
        for cursor, text in itertools.islice(read_lane(order, lane, shared=shared), limit):
            if cursor.epoch > epoch:
                break
            if cursor.epoch == epoch:
                yield cursor, text


def test_the_permutation_never_changes():
    # Golden values: another order would silently change every run that is resumed.
    assert permutation(8, "rows", 0, 1, "a.json.gz", 2, 3) == [0, 3, 6, 7, 1, 4, 2, 5]
    assert permutation(0, "rows") == []


@given(st.integers(0, 300), st.integers(0, 2**40), st.text(max_size=5))
def test_a_permutation_holds_each_item_once(size, seed, name):
    assert sorted(permutation(size, "rows", seed, name)) == list(range(size))


def test_keys_are_told_apart():
    orders = {
        tuple(permutation(64, *key)) for key in [("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), ("a", 1, 2, 0)]
    }
    assert len(orders) == 5


@quick
@given(files=st.integers(1, 12), lanes=st.integers(1, 16), epochs=st.integers(1, 3))
def test_lanes_take_each_entry_of_each_epoch_once(files, lanes, epochs):
    order = Order([f"{n}.json" for n in range(files)], seed=1, lanes=lanes, shuffle_block=4)
    taken = []
    for lane in range(lanes):
        place = (0, lane)
        while place[0] < epochs:
            taken.append((place[0], *order.locate(*place)))
            place = order.following(*place)
    expected = itertools.product(range(epochs), range(files), range(order.shares))
    assert sorted(taken) == sorted(expected)
    assert order.shares == 1 if files >= lanes else order.entries >= lanes


@quick
@given(
    rows=st.lists(st.integers(8, 30), min_size=1, max_size=6),
    lanes=st.integers(1, 8),
    block=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_row_comes_once_an_epoch(tmp_path_factory, rows, lanes, block, seed):
    files = write_corpus(tmp_path_factory.mktemp("corpus"), rows)
    order = Order(files, seed=seed, lanes=lanes, shuffle_block=block)
    expected = sorted(f"{index}:{row}" for index, count in enumerate(rows) for row in range(count))
    for epoch in range(2):
        assert sorted(text.split("x")[0].rstrip(".") for _, text in read_epoch(order, epoch)) == expected


@quick
@given(lane=st.integers(0, 4), skip=st.integers(0, 60), seed=st.integers(0, 5), held=st.sampled_from([0, 300, 1 << 20]))
def test_a_lane_goes_on_from_any_cursor(tmp_path_factory, lane, skip, seed, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_rows, "HELD_BYTES", held)
        files = write_corpus(tmp_path_factory.mktemp("corpus"), [17, 23, 40])
        order = Order(files, seed=seed, lanes=5, shuffle_block=4)
        whole = list(itertools.islice(read_lane(order, lane), skip + 30))
        start = Cursor(*whole[skip][0].to_list())
        assert list(itertools.islice(read_lane(order, lane, start), 30)) == whole[skip:]


@quick
@given(turns=st.lists(st.integers(0, 4), min_size=30, max_size=120), held=st.sampled_from([0, 300, 1 << 20]))
def test_sharing_a_file_never_changes_a_lane(tmp_path_factory, turns, held):
    files = write_corpus(tmp_path_factory.mktemp("corpus"), [60, 40])
    order = Order(files, seed=3, lanes=5, shuffle_block=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_rows, "HELD_BYTES", held)
        shared = SharedFiles(2, options=ReadOptions(retry_budget=0))
        lanes = [read_lane(order, lane, shared=shared) for lane in range(5)]
        got: list[list] = [[] for _ in lanes]
        for lane in turns:
            got[lane].append(next(lanes[lane]))
    for lane, seen in enumerate(got):
        assert seen == list(itertools.islice(read_lane(order, lane), len(seen)))


def test_order_knows_base_names_only(tmp_path):
    files = write_corpus(tmp_path, [20, 20, 20])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    there = [shutil.move(file, moved) for file in reversed(files)]
    order = Order(there, seed=1, lanes=2, shuffle_block=8)
    after = [text for _, text in itertools.islice(read_lane(order, 0), 100)]
    for file in there:
        shutil.copy(file, tmp_path)
    before = [text for _, text in itertools.islice(read_lane(Order(files, seed=1, lanes=2, shuffle_block=8), 0), 100)]
    assert before == after


def test_order_changes_with_seed_and_epoch(tmp_path):
    files = write_corpus(tmp_path, [40])
    first = [text for _, text in read_epoch(Order(files, seed=1, lanes=1, shuffle_block=16), 0)]
    second = [text for _, text in read_epoch(Order(files, seed=1, lanes=1, shuffle_block=16), 1)]
    other = [text for _, text in read_epoch(Order(files, seed=2, lanes=1, shuffle_block=16), 0)]
    assert sorted(first) == sorted(second) == sorted(other)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_rows_are_shuffled_inside_blocks_the_last_one_too(tmp_path):
    files = write_corpus(tmp_path, [40])
    rows = [
        int(text.split(":")[1].split("x")[0].rstrip("."))
        for _, text in read_epoch(Order(files, seed=1, lanes=1, shuffle_block=16), 0)
    ]
    for block in (slice(0, 16), slice(16, 32), slice(32, 40)):
        assert sorted(rows[block]) == list(range(*block.indices(40)))
        assert rows[block] != sorted(rows[block])


def test_lanes_of_one_rank_touch_few_files():
    order = Order([f"{n:02d}.json" for n in range(8)], seed=1, lanes=768, shuffle_block=64)
    touched = {order.locate(0, lane)[0] for lane in range(3, 768, 8)}
    assert len(touched) == 1


def test_a_lane_without_documents_names_the_key_and_the_mend(tmp_path):
    order = Order(write_corpus(tmp_path, [3]), seed=1, lanes=5, shuffle_block=4)
    assert [cursor.epoch for cursor, _ in itertools.islice(read_lane(order, 2), 2)] == [0, 1]
    with pytest.raises(DataError, match=r"data\.lanes: lane 3 of 5 has no document .*; use fewer lanes or more doc"):
        next(read_lane(order, 3))


def test_empty_files_are_passed_over(tmp_path):
    order = Order(write_corpus(tmp_path, [0, 0, 2, 0]), seed=1, lanes=1, shuffle_block=4)
    texts = [text for _, text in itertools.islice(read_lane(order, 0), 6)]
    assert sorted(texts[:2]) == sorted(texts[2:4]) == sorted(texts[4:6])


def test_a_cursor_beyond_a_file_that_shrank_is_an_error(tmp_path):
    files = [write_rows(tmp_path / "a.json", ["a"] * 5)]
    order = Order(files, seed=1, lanes=1, shuffle_block=4)
    with pytest.raises(DataError, match=r"a\.json: changed since the checkpoint: row 6 no longer exists"):
        next(read_lane(order, 0, Cursor(0, 0, 1, 1, 0)))
