"""Small files that stand for endless text: the file and the line are named, and little memory is taken."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.programs import TINY, environment, run, summary
from support.tiny import TinyCorpus, synthetic_documents, write_documents

from stablelm.config.load import load
from stablelm.config.rules import check
from stablelm.data import inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

MIB = 1 << 20
GOOD = json.dumps({"text": "a good document"}).encode() + b"\n"
READ = """
import re
import sys
from stablelm.data.storage.options import ReadOptions
from stablelm.data.formats.file_rows import documents
from stablelm.errors import DataError
try:
    print(sum(1 for _ in documents([sys.argv[1]], ReadOptions(retry_budget=0))))
except DataError as error:
    print(error)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss begins with the parent's
"""


def gz(mebibytes: int, content: bytes) -> bytes:
    """A good line, then so many MiB of this content, in a file a thousand times smaller."""
    return gzip.compress(GOOD) + gzip.compress(content * MIB) * mebibytes


def zst(mebibytes: int, content: bytes) -> bytes:
    packer, piece = zstandard.ZstdCompressor().compressobj(), content * MIB
    return b"".join([packer.compress(GOOD), *(packer.compress(piece) for _ in range(mebibytes)), packer.flush()])


def sparse(path: Path, mebibytes: int) -> None:
    path.write_bytes(GOOD)
    os.truncate(path, mebibytes * MIB)


def table(path: Path, mebibytes: int) -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 300), pa.array(["a" * mebibytes * MIB]))
    pq.write_table(pa.table({"text": values}), path, compression="zstd", store_schema=False)


FILES = {
    "line.json.gz": lambda path: path.write_bytes(gz(20000, b"x")),
    "line.json.zst": lambda path: path.write_bytes(zst(1000, b"x")),
    "newlines.json.gz": lambda path: path.write_bytes(gz(20000, b"\n")),
    "newlines.json.zst": lambda path: path.write_bytes(zst(1000, b"\n")),
    "zeros.json": lambda path: sparse(path, 4000),
    "table.parquet": lambda path: table(path, 80),
}


QUICK = ("line.json.gz", "line.json.zst", "zeros.json")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_a_file_that_expands_is_refused_in_little_memory(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    line, settings = [sys.executable, "-c", READ, str(path)], {"env": environment(), "timeout": 60, "check": True}
    done = subprocess.run(line, capture_output=True, text=True, **settings)
    assert f"{name}, line " in done.stdout
    assert "data.max_document_bytes=67108864" in done.stdout
    assert int(done.stdout.split()[-1]) < 1536 << 10, "KiB"


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "a.parquet"])
def test_the_bound_is_exact_and_can_be_raised(tmp_path, name):
    path, text = tmp_path / name, "y" * 5000
    lines = GOOD + json.dumps({"text": text}).encode() + b"\n" + GOOD
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["a good document", text, "a good document"]}), path)
    else:
        path.write_bytes({"": lines, ".gz": gzip.compress(lines), ".zst": zstandard.compress(lines)}[name[6:]])
    length = len(text) if name.endswith(".parquet") else len(json.dumps({"text": text}))
    wanted = ["a good document", text, "a good document"]
    assert list(documents([str(path)], ReadOptions(max_document_bytes=length))) == wanted
    says = rf"{name}, line 2: longer than data\.max_document_bytes={length - 1}; raise that if it is one document"
    with pytest.raises(DataError, match=says):
        list(documents([str(path)], ReadOptions(max_document_bytes=length - 1)))
    with pytest.raises(ConfigError, match=f"^data.path: .*{says}"):
        inspection.check([str(path)], key="data.path", options=ReadOptions(max_document_bytes=length - 1))


def test_blank_lines_between_documents_are_counted_anew(tmp_path):
    (tmp_path / "a.json").write_bytes((GOOD + b"\n" * 900) * 50)
    assert len(list(documents([str(tmp_path / "a.json")], ReadOptions(max_document_bytes=70_000)))) == 50


def test_a_gzip_header_without_an_end(tmp_path):
    """Its name goes on for ever."""
    (tmp_path / "a.json.gz").write_bytes(b"\x1f\x8b\x08\x08" + bytes(6))
    with open(tmp_path / "a.json.gz", "ab") as file:
        for _ in range(64):
            file.write(b"n" * MIB)
    with pytest.raises(ConfigError, match=r"a\.json\.gz: damaged near byte \d{7} .*header without an end"):
        inspection.check([str(tmp_path / "a.json.gz")], key="data.path")


@pytest.mark.parametrize("value", [0, -1])
def test_values_that_cannot_be(value):
    with pytest.raises(ConfigError, match=f"data.max_document_bytes={value} must be at least 1"):
        check(load([], [f"data.max_document_bytes={value}", "train.steps=1"]).config, 1, None)


def test_a_long_line_in_mid_training_ends_with_77(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        texts = synthetic_documents(60, seed=index)
        write_documents(folder / f"a{index}.json.gz", texts if index != 2 else [*texts[:40], "z" * 30_000, *texts[40:]])
    line = (*TINY, *tiny_corpus.overrides(), f"data.path={folder}", f"run.dir={tmp_path / 'run'}")
    # A corpus of small files is read whole before the start: there is no telling one from the other but by its size.
    refused = run("pretrain", *line, "data.max_document_bytes=20000")
    assert refused.returncode == 78, refused.stderr
    assert "a2.json.gz, line 41: longer than data.max_document_bytes=20000" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = run("pretrain", *line, "train.steps=3", "run.stop_after=2")
    assert done.returncode == 75, done.stderr
    assert summary(tmp_path / "run")["exit_code"] == 75
