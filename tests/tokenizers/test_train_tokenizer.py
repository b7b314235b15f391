import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.samples import REPOSITORY

from stablelm.tokenizers import load_tokenizer

PROGRAM = REPOSITORY / "data" / "train_tokenizer.py"
WORDS = ["lane", "token", "layer", "stream", "norm", "head", "depth", "width", "batch", "epoch"]


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, cwd=folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = [" ".join(WORDS[(n * k) % 10] for k in range(20)) + f"\nand {n}" for n in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path = tmp_path / "text.json.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    return path


def test_trains_the_same_model_twice_and_reports(source: Path, tmp_path: Path):
    for name in ("one.model", "sub/two.model"):
        result = call(tmp_path, "--source", str(source), "--vocab-size", "290", "--out", name)
        assert result.returncode == 0, result.stderr
        first, second = result.stdout.splitlines()
        assert first.startswith(f"{name}: 290 pieces, trained on ")
        assert " bytes per token on " in second
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "sub" / "two.model").read_bytes()
    assert load_tokenizer(tmp_path / "one.model").pieces == 290
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["two.model"]


def test_byte_level_bpe_is_the_same_twice_and_gives_every_text_back(source: Path, tmp_path: Path):
    common = ["--kind", "bpe-bytes", "--source", str(source), "--vocab-size", "290"]
    for name in ("one.json", "two.json"):
        result = call(tmp_path, *common, "--out", name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{name}: 290 pieces, trained on ")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one.json")
    assert (tokenizer.pieces, tokenizer.eos, tokenizer.unknown) == (290, 0, None)
    text = " lane token\n\n\tnaïve ☃\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for size, says in (("100", "it needs at least 257"), ("9000", "it gives at most ")):
        result = call(tmp_path, *common[:-1], size, "--out", "three.json")
        assert result.returncode == 78 and says in result.stderr and not (tmp_path / "three.json").exists()


def test_the_draw_depends_on_the_seed_and_kind_on_the_model_type(source: Path, tmp_path: Path):
    common = ["--source", str(source), "--vocab-size", "295", "--sentences", "100"]
    for name, more in {"a": [], "b": ["--seed", "1"], "c": ["--model-type", "bpe"]}.items():
        result = call(tmp_path, *common, "--out", name, *more)
        assert result.returncode == 0, result.stderr
        assert "trained on 100 lines" in result.stdout
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--source", "none.json", "--vocab-size", "290"], "--source: 'none.json' does not exist"),
        (
            ["--source", "{source}", "--vocab-size", "20"],
            "it needs at least 2",
        ),
        (
            ["--source", "{source}", "--vocab-size", "90000"],
            "--vocab-size: 90000 pieces cannot be learned",
        ),
        (["--source", "{source}", "--vocab-size", "290", "--sentences", "0"], "--sentences: must be at least 1, not 0"),
        (["--source", "{source}", "--vocab-size", "many"], "invalid int value: 'many'"),
        (["--vocab-size", "290"], "the following arguments are required: --source"),
        (
            ["--source", "{source}", "--vocab-size", "290", "--kind", "bpe-bytes"],
            "--out: 'out.model' is not how a bpe-bytes file is named; give a name that ends in .json",
        ),
        (
            ["--source", "{source}", "--vocab-size", "290", "--kind", "bpe-bytes", "--model-type", "bpe"],
            "--model-type: bpe is a kind of SentencePiece model; leave it out",
        ),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str, source: Path, tmp_path: Path):
    result = call(tmp_path, *(word.format(source=source) for word in words), "--out", "out.model")
    assert result.returncode == 78
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.model").exists()


def test_an_output_that_cannot_be_written_keeps_what_was_there(source: Path, tmp_path: Path):
    result = call(tmp_path, "--source", str(source), "--vocab-size", "290", "--out", f"{source}/x.model")
    assert result.returncode == 78
    assert result.stderr.startswith(f"--out: cannot write '{source}/x.model' (")


def test_a_line_that_is_not_json_is_found_before_anything_is_read(source: Path, tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"text": "one"}\nnot json\n')
    result = call(tmp_path, "--source", "bad.json", "--vocab-size", "290", "--out", "out.model")
    assert result.returncode == 78
    assert "bad.json, line 2: not valid JSON" in result.stderr


def test_help_is_quick(tmp_path: Path):
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert "--vocab-size" in call(tmp_path, "--help").stdout
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5
