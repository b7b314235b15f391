"""Plain text files: a document a file, or a line."""

import gzip
from pathlib import Path

import pytest
import zstandard

from stablelm.data import corpus, inspection
from stablelm.data.formats.file_rows import FileRows, documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError

TEXT = "First line.\r\n\n  Second, ünïcode.\n"
PACK = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.zst": zstandard.ZstdCompressor().compress}
FILE, LINE = ReadOptions(retry_budget=0), ReadOptions(retry_budget=0, text_unit="line")


@pytest.fixture(params=PACK)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"a{request.param}"
    path.write_bytes(PACK[request.param](b"\xef\xbb\xbf" + TEXT.encode()))
    return str(path)


def in_capitals(row: dict) -> dict:
    return {"text": row["text"].upper()}


def test_a_file_or_a_line(file: str):
    for options in (FILE, LINE):
        assert corpus.resolve(file, key="data.path", cache="unused", options=options) == [file]
        inspection.check([file], key="data.path", options=options)
    assert list(documents([file], FILE)) == [TEXT]
    assert list(documents([file], LINE)) == ["First line.", "  Second, ünïcode."]
    mapped = ReadOptions(retry_budget=0, text_unit="line", map=f"{__name__}:in_capitals")
    assert list(documents([file], mapped)) == ["FIRST LINE.", "  SECOND, ÜNÏCODE."]


def test_lines_are_found_by_number(tmp_path: Path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("".join(f"line {n}\n" for n in range(500)).encode()))
    rows = FileRows(str(path), room=1 << 20, options=LINE).take(range(300, 303))
    assert rows == [(301, "line 300"), (302, "line 301"), (303, "line 302")]


@pytest.mark.parametrize("options", [FILE, LINE])
def test_bytes_that_are_no_text_name_their_line(tmp_path: Path, options: ReadOptions):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(ConfigError, match=r"a\.txt, line 3: the byte 0xe9 is not UTF-8 .*data\.bad_rows=skip"):
        inspection.check([str(path)], key="data.path", options=options)


@pytest.mark.parametrize("options", [FILE, LINE])
def test_a_file_of_blanks_holds_no_document(tmp_path: Path, options: ReadOptions):
    path = tmp_path / "a.txt"
    path.write_bytes(b" \n\n")
    with pytest.raises(ConfigError, match="holds no document"):
        inspection.check([str(path)], key="data.path", options=options)


def test_notes_beside_other_files_are_not_text(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("read me")
    assert corpus.resolve(str(tmp_path), key="data.path", cache="unused") == [str(tmp_path / "notes.txt")]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert corpus.resolve(str(tmp_path), key="data.path", cache="unused") == [str(tmp_path / "a.jsonl")]


def test_lanes_want_as_many_documents_as_files_have(tmp_path: Path):
    files = []
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT)
        files.append(str(tmp_path / f"{name}.txt"))
    inspection.check_lanes(files, 2, options=FILE)
    inspection.check_lanes(files, 4, options=LINE)
    with pytest.raises(ConfigError, match=r"4 lanes over 2 files .* holds 1; set at most 2 lanes"):
        inspection.check_lanes(files, 4, options=FILE)
