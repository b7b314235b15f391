import gzip
import json
from pathlib import Path

import pytest
import zstandard

from stablelm.data import inspection
from stablelm.data.inspection import check, check_enough, check_lanes
from stablelm.errors import ConfigError
from stablelm.tokenizers import Tokenizer, load_tokenizer
from stablelm.tokenizers.training import train

GOOD = b'{"text":"one"}\n{"text":"two"}\n'
LONG = b"".join(json.dumps({"text": f"{n} {hash((n, 7))}"}).encode() + b"\n" for n in range(20_000))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json.gz", gzip.compress(GOOD, mtime=0)),
        ("a.json.gz", gzip.compress(GOOD, mtime=0) + gzip.compress(LONG, mtime=0)),
        ("a.jsonl.zst", zst(GOOD) + zst(LONG)),
        ("a.json", GOOD),
        ("a.jsonl", b"\xef\xbb\xbf\n  \n" + GOOD.rstrip()),
    ],
)
def test_good_files_pass(name: str, content: bytes, tmp_path: Path):
    check([write(tmp_path, name, content)], key="data.path")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", GOOD, "is of an unsupported file type; give files named *.json.gz"),
        ("a.parquet", b"PAR1", "damaged or not a parquet file"),
        ("a.parquet", GOOD, "holds plain data, but its name says parquet"),
        ("a.json.gz", b"", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.json.gz", GOOD, "holds plain data, but its name says gzip"),
        ("a.json.gz", b"<html>not found</html>", "holds plain data, but its name says gzip"),
        ("a.json.gz", zst(GOOD), "holds zstandard data, but its name says gzip"),
        ("a.json.zst", gzip.compress(GOOD, mtime=0), "holds gzip data, but its name says zstandard"),
        ("a.json", gzip.compress(GOOD, mtime=0), "holds gzip data, but its name says plain; rename it"),
        ("a.json.gz", gzip.compress(b"", mtime=0), "holds no document"),
        ("a.json", b"\n \n", "holds no document"),
        ("a.json", b"some words\n", "line 1: not valid JSON"),
        ("a.json", b'[{"text":"one"}]\n', "line 1: not a JSON object"),
        ("a.json", b'{"content":"one"}\n', "line 1: without a string under 'text'"),
        ("a.json", b'{"text":null}\n', "line 1: without a string under 'text'"),
        ("a.json.gz", gzip.compress(GOOD, mtime=0)[:20], "truncated"),
        ("a.json.gz", gzip.compress(LONG, mtime=0)[:-1000], "truncated"),
        ("a.json.gz", gzip.compress(LONG, mtime=0)[:-3], "truncated"),
        ("a.json.zst", zst(LONG)[:-1000], "truncated"),
        (
            "a.json.gz",
            gzip.compress(LONG, mtime=0)[:9000] + bytes(2000) + gzip.compress(LONG, mtime=0)[11000:],
            "damaged",
        ),
    ],
)
def test_files_that_are_wrong(name: str, content: bytes, says: str, tmp_path: Path):
    good = write(tmp_path, "0.json", GOOD)
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError) as caught:
        check([good, path], key="data.path")
    message = str(caught.value)
    assert message.startswith("data.path: ")
    assert path in message
    assert says in message
    assert "; " in message  # the mend
    assert "\n" not in message


def test_every_file_that_is_wrong_is_named(tmp_path: Path):
    files = [write(tmp_path, f"{n:02}.json", b"" if n % 5 == 1 else GOOD) for n in range(60)]
    with pytest.raises(ConfigError) as caught:
        check([*files, write(tmp_path, "cut.json", GOOD + b'{"text": ')], key="data.path")
    lines = str(caught.value).splitlines()
    assert [line for line in lines if not line.startswith("data.path: ")] == ["and 5 more problems of this kind"]
    assert "01.json' is empty" in lines[0] and "36.json' is empty" in lines[7] and len(lines) == 9
    with pytest.raises(ConfigError, match=r"01\.json' is empty[^\n]*\n[^\n]*cut\.json, line 3"):
        check([*files[:5], str(tmp_path / "cut.json")], key="data.path")


def test_a_file_that_vanished_and_one_that_is_a_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^data\.path: cannot read .*No such file"):
        check([str(tmp_path / "gone.json")], key="data.path")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"^data\.path: cannot read .*Is a directory"):
        check([str(tmp_path / "folder.json")], key="data.path")


def test_large_files_are_read_only_at_their_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "a.json.gz", gzip.compress(LONG, mtime=0)[:-1000])
    monkeypatch.setattr(inspection, "SMALL_FILE", 1000)
    check([path], key="data.path")
    monkeypatch.setattr(inspection, "SMALL_FILE", 2**20)
    monkeypatch.setattr(inspection, "SMALL_CORPUS", 1000)
    check([path], key="data.path")


def test_remote_files_are_not_opened():
    check(["https://host.invalid/a.json.gz"], key="data.path")
    check_lanes(["https://host.invalid/a.json.gz"], 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("inspection") / "bytes.model"
    path.write_bytes(train(["one two three four"] * 50, vocab_size=270))
    return load_tokenizer(path)


def test_enough_tokens_counts_eos_and_stops_when_it_has_seen_enough(tokenizer: Tokenizer, tmp_path: Path):
    path = write(tmp_path, "a.json.gz", gzip.compress(GOOD, mtime=0))
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in ("one", "two"))
    check_enough([path], tokenizer, tokens, key="data.path")
    with pytest.raises(ConfigError) as caught:
        check_enough([path], tokenizer, tokens + 1000, key="data.path")
    says = f"holds {tokens} tokens in 2 documents, fewer than the {tokens + 1000} of one batch; give more text"
    assert str(caught.value).startswith("data.path: ")
    assert says in str(caught.value)
    # The second file is never opened: the first one is enough.
    check_enough([path, write(tmp_path, "b.json", b"junk\n")], tokenizer, 3, key="data.path")


def test_enough_tokens_by_size_reads_nothing(tokenizer: Tokenizer, tmp_path: Path):
    path = write(tmp_path, "a.json", b"junk\n" * 1000)
    check_enough([path], tokenizer, 1250, key="data.path")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_enough([path], tokenizer, 1251, key="data.path")


def test_lanes_need_a_document_each(tmp_path: Path):
    three = write(tmp_path, "a.json", b'{"text":"x"}\n' * 3)
    five = write(tmp_path, "b.json.gz", gzip.compress(b'{"text":"x"}\n' * 5, mtime=0))
    check_lanes([three, five], 2)
    check_lanes([three, five], 6)
    with pytest.raises(ConfigError) as caught:
        check_lanes([three, five], 7)
    assert str(caught.value) == (
        f"data.lanes: 7 lanes over 2 files take 4 documents from each, but {three!r} holds 3; "
        "set at most 6 lanes, or give more text"
    )
