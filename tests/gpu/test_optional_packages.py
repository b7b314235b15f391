"""A machine with a GPU needs little beside torch: training runs without deepspeed, datasets and quicker parsers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import environment
from support.tiny import TinyCorpus

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from stablelm.programs.command import main
sys.exit(main(sys.argv[1:]))
"""
NAMES = ("deepspeed", "datasets", "orjson", "isal", "zstandard", "pyarrow", "accelerate")


def run_without(*arguments: str, names: tuple[str, ...] = NAMES) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(names=set(names)), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)


def settings(corpus: TinyCorpus, folder: Path) -> list[str]:
    return [
        *("model.method=pre_ln", "model.n_layers=2", "model.d_model=32", "model.n_heads=2", "data.seq_len=32"),
        *("data.lanes=4", "train.steps=2", "train.global_batch_size=4", "train.warmup_steps=1", "evaluate.batches=1"),
        *("observe.every=1", f"run.dir={folder}", *corpus.overrides()),
    ]


@pytest.mark.slow
def test_training_and_its_page(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run_without("pretrain", *settings(tiny_corpus, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert "damaged" not in (tmp_path / "run" / "report.html").read_text()


def test_zstandard_is_asked_for_where_it_is_needed(tiny_corpus: TinyCorpus, tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    (source,) = (path for path in (tiny_corpus.folder / "train").glob("*00000*"))
    packed = tmp_path / "text.json.zst"
    packed.write_bytes(zstandard.compress(gzip.decompress(source.read_bytes())))
    done = run_without("pretrain", *settings(tiny_corpus, tmp_path / "run"), f"data.path={packed}")
    assert done.returncode == 78, done.stderr
    assert "text.json.zst: needs the package zstandard; run pip install zstandard" in done.stderr
    assert not (tmp_path / "run").exists()


ROWS = [
    *(b'{"text": "a"}', b'{"text": "\xc3\xa9\\ud83d\\ude00", "n": [1, 2.5, null]}', b"[1]", b'"a"', b"", b"{"),
    *(b'{"text": NaN}', b"Infinity", b'{"text": "\xff"}', b'{"a": 1} x', b"[" * 100_000),
]


def test_the_fallback_reads_what_orjson_reads():
    """Each row's value, or that it is refused."""
    program = """
import json, sys
sys.modules["orjson"] = None
from stablelm.quick_json import JSONDecodeError, loads
found = []
for row in json.loads(sys.stdin.read()):
    try:
        found.append([loads(bytes(row))])
    except JSONDecodeError:
        found.append(None)
print(json.dumps(found))
"""
    rows = json.dumps([list(row) for row in ROWS])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), input=rows, capture_output=True, text=True, check=True
    )
    orjson = pytest.importorskip("orjson")
    wanted = []
    for row in ROWS:
        try:
            wanted.append([orjson.loads(row)])
        except orjson.JSONDecodeError:
            wanted.append(None)
    assert json.loads(done.stdout) == wanted
    assert wanted.count(None) == 7
