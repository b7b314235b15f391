"""Documents from lines, and files that several lanes read together."""

import threading

import pytest
from support.letters import write_corpus, write_rows

from stablelm.data.formats import file_rows
from stablelm.data.formats.file_rows import FileRows, SharedFiles, document_text, documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError


def numbers(rows):
    return None if rows is None else [number - 1 for number, _ in rows]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'text': 1}", "not valid JSON"),
        (b'{"text": "cut off', "not valid JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "without a string under 'text'"),
        (b'{"text": null}', "without a string under 'text'"),
    ],
)
def test_a_bad_line_names_file_line_and_mend(tmp_path, line, reason):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    stream = documents([str(path)], ReadOptions(retry_budget=0))
    assert next(stream) == "good"
    with pytest.raises(DataError, match=rf"{path}, line 3: {reason}.*; make every line an object"):
        next(stream)


def test_text_is_kept_as_it_is():
    line = '{"text": " ünï\\n\\u00e9 \\ud83d\\ude00\\n"}'.encode()
    assert document_text((1, line), url="u") == " ünï\né 😀\n"


def test_documents_come_by_base_name(tmp_path):
    (tmp_path / "z").mkdir()
    files = [write_rows(tmp_path / "b.json", ["b"]), write_rows(tmp_path / "z" / "a.json", ["a1", "a2"])]
    assert list(documents(files, ReadOptions(retry_budget=0))) == ["a1", "a2", "b"]


def test_rows_are_read_forward_and_forgotten_beyond_the_room(tmp_path):
    (file,) = write_corpus(tmp_path, [100])
    rows = FileRows(file, room=0, options=ReadOptions(retry_budget=0))
    assert numbers(rows.take(range(40, 48, 2))) == [40, 42, 44, 46]
    assert rows.take(range(30, 38, 2)) is None
    assert numbers(rows.take(range(48, 56, 2))) == [48, 50, 52, 54]
    assert rows.take(range(90, 98, 2)) is None, "too far ahead"
    assert numbers(rows.take(range(56, 104, 2))) == list(range(56, 100, 2))
    assert rows.take(range(104, 120, 2)) == []
    roomy = FileRows(file, room=1 << 20, options=ReadOptions(retry_budget=0))
    assert numbers(roomy.take(range(98, 102, 1))) == [98, 99]
    assert numbers(roomy.take(range(0, 4, 1))) == [0, 1, 2, 3]


def test_an_error_is_not_mistaken_for_the_end(tmp_path):
    path = tmp_path / "a.json.gz"
    write_rows(path, [str(row) * 50 for row in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    rows = FileRows(str(path), room=0, options=ReadOptions(retry_budget=0))
    for _ in range(2):
        with pytest.raises(DataError, match="truncated"):
            rows.take(range(0, 1000, 1))


def test_one_pass_serves_all_lanes_of_a_file(tmp_path, monkeypatch):
    (file,) = write_corpus(tmp_path, [100])
    opened = []
    real = file_rows.rows_from
    monkeypatch.setattr(file_rows, "rows_from", lambda *a, **k: opened.append(1) or real(*a, **k))
    shared = SharedFiles(1, options=ReadOptions(retry_budget=0))
    for first in range(0, 100, 20):
        for share in range(4):
            assert numbers(shared.take(file, range(first + share, first + share + 20, 4))) == list(
                range(first + share, first + share + 20, 4)
            )
    assert len(opened) == 1


def test_lanes_that_fall_far_behind_or_enter_the_next_epoch(tmp_path, monkeypatch):
    (file,) = write_corpus(tmp_path, [200])
    monkeypatch.setattr(file_rows, "HELD_BYTES", 2000)
    shared = SharedFiles(1, options=ReadOptions(retry_budget=0))
    for first in range(0, 200, 20):
        assert len(shared.take(file, range(first, first + 20, 2)) or []) == 10
    # The first of the next epoch begins a second pass; the last of this epoch is still served.
    assert numbers(shared.take(file, range(0, 20, 2))) == list(range(0, 20, 2))
    assert numbers(shared.take(file, range(181, 201, 2))) == list(range(181, 200, 2))
    assert shared.take(file, range(101, 121, 2)) is None


def test_threads_share_a_pass(tmp_path):
    (file,) = write_corpus(tmp_path, [400])
    shared = SharedFiles(1, options=ReadOptions(retry_budget=0))
    seen: dict[int, list[int]] = {}

    def lane(share):
        taken = [shared.take(file, range(first + share, first + share + 40, 4)) for first in range(0, 400, 40)]
        seen[share] = [number - 1 for rows in taken for number, _ in rows or [(0, b"")]]

    threads = [threading.Thread(target=lane, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {share: list(range(share, 400, 4)) for share in range(4)}
