"""Rows that hold no document: what is read all the same, what is found before the start, and what skipping counts."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.letters import LetterTokenizer

from stablelm.config.schema import DataConfig
from stablelm.data import inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.loader import Loader
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

TEXTS = [f"document {n} of some" for n in range(40)]
AT_ONCE = ReadOptions(retry_budget=0)
SKIPPING = ReadOptions(retry_budget=0, bad_rows="skip")
LINES = [json.dumps({"text": text}).encode() for text in TEXTS]


def file_of(path: Path, lines: list[bytes]) -> str:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize(
    "other",
    [
        b'"score": NaN',
        b'"score": [Infinity, {"a": -Infinity}]',
        b'"other": "half a pair \\ud83d here"',
        b'"other": "a byte \xff here"',
        b'"\xff": 1',
        b'"other": "a raw\ttab"',
        b'"huge": 1e999, "long": 123456789012345678901234567890',
        b'"deep": ' + b"[" * 300 + b"]" * 300,
        b'"text2": null, "text": "overruled"',
    ],
)
@pytest.mark.parametrize("map", [None, f"{__name__}:as_it_is"])
def test_only_the_text_column_matters(tmp_path: Path, other: bytes, map: str | None):
    lines = [line[:1] + other + b", " + line[1:] for line in LINES]
    options = ReadOptions(retry_budget=0, map=map)
    file = file_of(tmp_path / "a.jsonl", lines)
    inspection.check([file], key="data.path", options=options)
    assert list(documents([file], options)) == TEXTS


def as_it_is(row: dict) -> dict:
    return row


BAD = {
    "cut off": (b'{"text": "cut', "not valid JSON"),
    "not an object": (b'["text"]', "not a JSON object"),
    "no key": (b'{"body": "text"}', "without a string under 'text'"),
    "null": (b'{"text": null}', "without a string under 'text'"),
    "NaN": (b'{"text": NaN}', "without a string under 'text'"),
    "half a pair": (b'{"text": "half a pair \\ud83d here"}', r"a lone surrogate (\ud83d) under 'text'"),
    "other half": (b'{"text": "half a pair \\ude00 here"}', r"a lone surrogate (\ude00) under 'text'"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "the byte 0xe9, which is not UTF-8"),
    "not UTF-8, NaN": (b'{"score": NaN, "text": "caf\xe9"}', "the byte 0xe9, which is not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("map", [None, f"{__name__}:as_it_is"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_a_bad_row_is_found_in_the_check_or_skipped(tmp_path: Path, kind: str, map: str | None, name: str):
    line, says = BAD[kind]
    file = file_of(tmp_path / name, [*LINES[:17], line, *LINES[17:]])
    with pytest.raises(ConfigError) as caught:
        inspection.check([file], key="data.path", options=ReadOptions(map=map))
    message = str(caught.value)
    assert message.startswith(f"data.path: {file}, ") and "\n" not in message
    assert "line 18" in message or (map and "row 18" in message)
    assert (says in message or (map and "no text" in message)) and "or set data.bad_rows=skip" in message
    skipping = ReadOptions(map=map, bad_rows="skip")
    inspection.check([file], key="data.path", options=skipping)
    assert list(documents([file], skipping)) == TEXTS


def test_a_file_of_bad_rows_alone_is_refused_though_they_are_skipped(tmp_path: Path):
    file = file_of(tmp_path / "a.jsonl", [b'{"body": "text"}'] * 9)
    with pytest.raises(ConfigError, match=r"line 1: without a string under 'text'.* would leave nothing of this file"):
        inspection.check([file], key="data.path", options=SKIPPING)


def parquet(path: Path, table: pa.Table) -> str:
    pq.write_table(table, path)
    return str(path)


def not_utf8() -> pa.Array:
    return pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0\7\0\0\0"), pa.py_buffer(b"one\xff\xfe__")]
    )


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array(["one", None]), "row 2: no value under 'text'"),
        (pa.array(["one", None]).dictionary_encode(), "row 2: no value under 'text'"),
        (not_utf8(), "row 2: bytes that are not UTF-8 (invalid start byte) under 'text'"),
    ],
)
def test_bad_rows_of_tables(tmp_path: Path, column: pa.Array, says: str):
    file = parquet(tmp_path / "a.parquet", pa.table({"text": column}))
    with pytest.raises(ConfigError) as caught:
        inspection.check([file], key="data.path")
    assert says in str(caught.value) and "data.bad_rows=skip" in str(caught.value)
    assert list(documents([file], SKIPPING)) == ["one"]
    assert list(documents([file], ReadOptions(bad_rows="skip", map=f"{__name__}:as_it_is"))) == ["one"]


def test_categories_are_text(tmp_path: Path):
    texts = pa.array(TEXTS * 2).dictionary_encode()
    file = parquet(tmp_path / "a.parquet", pa.table({"text": texts, "twice": texts}))
    assert list(documents([file], AT_ONCE)) == TEXTS * 2


@pytest.mark.parametrize(
    "column", [[{"a": "x"}], [["x"]], [b"x"], [1.5], pa.array([b"x"]).dictionary_encode()], ids=str
)
def test_columns_of_other_kinds_name_the_map(tmp_path: Path, column: list | pa.Array):
    file = parquet(tmp_path / "a.parquet", pa.table({"text": column}))
    with pytest.raises(ConfigError, match=r"column 'text' holds .*, not text; set data\.text_column .* data\.map"):
        inspection.check([file], key="data.path")


@pytest.mark.parametrize(("names", "map"), [(["text", "text"], None), (["text", "x", "x"], f"{__name__}:as_it_is")])
def test_two_columns_of_one_name(tmp_path: Path, names: list[str], map: str | None):
    file = parquet(tmp_path / "a.parquet", pa.table([pa.array(TEXTS)] * len(names), names=names))
    with pytest.raises(ConfigError, match=rf"has 2 columns named '{names[-1]}'; rename all but one of them$"):
        inspection.check([file], key="data.path", options=ReadOptions(map=map))
    if names[-1] != "text":
        assert list(documents([file], AT_ONCE)) == TEXTS


def long_window(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


def skippable(data: bytes) -> bytes:
    frame = (0x184D2A5F).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"123456789"
    return frame + zstandard.ZstdCompressor().compress(data) + frame


@pytest.mark.parametrize("pack", [long_window, skippable])
def test_other_forms_of_zstandard(tmp_path: Path, pack: Callable[[bytes], bytes]):
    path = tmp_path / "a.json.zst"
    path.write_bytes(pack(b"\n".join(LINES)))
    inspection.check([str(path)], key="data.path")
    assert list(documents([str(path)], AT_ONCE)) == TEXTS


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_skipped_rows_are_counted_once_however_often_a_run_resumes(tmp_path: Path, packing: str, kind: str):
    lines = [row for n, line in enumerate(LINES) for row in ([line, b'{"text": "cut'] if n % 5 == 0 else [line])]
    files = [file_of(tmp_path / f"{name}.jsonl", lines) for name in "ab"]

    def loader(workers: int) -> Loader:
        data = DataConfig(
            seq_len=16,
            lanes=6,
            shuffle_block=4,
            packing=packing,  # pyright: ignore[reportArgumentType]
            bad_rows="skip",
            workers=workers,
            worker_kind=kind,  # pyright: ignore[reportArgumentType]
        )
        return Loader(files, LetterTokenizer(), data, seed=1, global_batch_size=6)

    whole, counted, resumed = loader(1), 0, 0
    for _ in range(40):
        whole.next()
        counted += whole.counts()["skipped_rows"]
    whole.close()
    each = loader(0)
    for step in range(40):
        each.next()
        resumed += each.counts()["skipped_rows"]
        if step % 3 == 0:
            state = json.loads(json.dumps(each.state()))
            each = loader(0)
            each.load(state)
    assert counted == resumed > 16
    assert each.state() == whole.state()


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_run_that_ended_at_a_bad_row_goes_on_by_skipping_it(tmp_path: Path, packing: str):
    lines = LINES * 3
    lines[70:70] = [b'{"text": "cut']
    files = [file_of(tmp_path / "a.jsonl", lines)]

    def loader(bad_rows: str) -> Loader:
        data = DataConfig(seq_len=16, lanes=2, shuffle_block=4, packing=packing, bad_rows=bad_rows, workers=0)  # type: ignore[arg-type]
        return Loader(files, LetterTokenizer(), data, seed=1, global_batch_size=2)

    skipping = loader("skip")
    whole = [skipping.next().tokens.tolist() for _ in range(160)]
    stopping, state, steps = loader("stop"), {}, []

    def to_the_end() -> None:
        nonlocal state
        for _ in range(160):
            state = stopping.state()
            steps.append(stopping.next().tokens.tolist())

    with pytest.raises(DataError, match="line 71: not valid JSON"):
        to_the_end()
    assert len(steps) > 20
    again = loader("skip")
    again.load(state)
    steps += [again.next().tokens.tolist() for _ in range(160 - len(steps))]
    assert steps == whole and again.counts()["skipped_rows"] > 0
