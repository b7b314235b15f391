"""Runs with a tokenizer.json: killed, resumed under another engine, evaluated; and what is refused."""

import json
import time
from pathlib import Path

import pytest
import yaml
from support import tokenizer_files
from support.forked import start_forked
from support.programs import LAUNCH, TINY, environment, losses, run, summary
from support.tiny import TinyCorpus, synthetic_documents

from stablelm.tokenizers import load_tokenizer
from stablelm.tokenizers.training import sample_lines, train_byte_level


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 pieces for the tiny corpus, whose special tokens are named beside it."""
    lines = sample_lines(synthetic_documents(60, seed=0), 1000, seed=0, ends=True)
    content = tokenizer_files.changed(
        train_byte_level(lines, vocab_size=300),
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 300, "content": "<start>"}),
    )
    settings = {"bos_token": "<start>", "eos_token": "<|endoftext|>"}
    return tokenizer_files.write(tmp_path_factory.mktemp("bpe") / "tokenizer", content, tokenizer_config=settings)


def arguments(corpus: TinyCorpus, tokenizer: Path, run_dir: Path, *more: str) -> list[str]:
    return [*TINY, *corpus.overrides(), f"data.tokenizer={tokenizer}", f"run.dir={run_dir}", *more]


def test_a_run_with_byte_level_bpe_is_killed_resumed_elsewhere_and_evaluated(
    tiny_corpus: TinyCorpus, folder: Path, tmp_path: Path
):
    own = ("data.add_bos=true", "data.eos_token=<|endoftext|>", "checkpoint.every=3", "data.workers=2")
    whole = run("pretrain", *arguments(tiny_corpus, folder, tmp_path / "whole", *own))
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    line = arguments(tiny_corpus, folder, killed, *own, "data.worker_kind=process")
    process = start_forked(str(LAUNCH / "pretrain.py"), line, environment(), output=tmp_path)
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
        assert process.exitcode is None, (tmp_path / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    last = run("pretrain", *arguments(tiny_corpus, folder, killed, *own, "engine.kind=fsdp2"), processes=2)
    assert last.returncode == 0, last.stderr
    assert losses(killed) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert sorted(losses(killed)) == list(range(1, 21))
    # 300 pieces and the added token, padded to a multiple of 64.
    assert yaml.safe_load((killed / "resolved.yaml").read_text())["model"]["vocab_size"] == 320
    assert yaml.safe_load((killed / "config.yaml").read_text())["data"]["eos_token"] == "<|endoftext|>"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (killed / name).read_bytes() == (folder / name).read_bytes()
    kept = json.loads((killed / "identity.json").read_text())
    assert kept["data.tokenizer"] == load_tokenizer(folder, add_bos=True).sha256
    assert (kept["data.add_bos"], kept["data.eos_token"]) == (True, "<|endoftext|>")

    out = tmp_path / "scores.json"
    moved = killed.rename(tmp_path / "moved")
    done = run("eval", "--checkpoint", str(moved), "--data", tiny_corpus.validation, "--out", str(out))
    assert done.returncode == 0, done.stderr
    [scores] = json.loads(out.read_text())["sets"].values()
    assert 0 < scores["bits_per_byte"] < 8
    assert summary(moved)["val_loss"]["default"] > 0

    (moved / "tokenizer_config.json").write_text('{"eos_token": "<start>", "bos_token": "<|endoftext|>"}')
    done = run("eval", "--checkpoint", str(moved), "--data", tiny_corpus.validation)
    assert done.returncode == 78 and "is not the one that" in done.stderr


def test_another_end_is_another_run(tiny_corpus: TinyCorpus, folder: Path, tmp_path: Path):
    short = ("train.steps=2", "model.n_layers=1", "checkpoint.every=1")
    done = run("pretrain", *arguments(tiny_corpus, folder, tmp_path / "run", *short, "run.stop_after=1"))
    assert done.returncode == 75, done.stderr
    for key in ("data.add_bos=true", "data.eos_token=<start>"):
        done = run("pretrain", *arguments(tiny_corpus, folder, tmp_path / "run", *short, key))
        assert done.returncode == 78 and f"{key.partition('=')[0]}: saved with" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.vocab_size=256"], "model.vocab_size=256 is smaller than the tokenizer, which has 301 pieces"),
        (["data.eos_token=<none>"], "data.eos_token='<none>' is not a token of"),
        (["data.tokenizer={tokenizer}.model", "data.add_bos=true"], "data.tokenizer: "),
        (["data.tokenizer={tokenizer}/bare", "data.add_bos=true"], "has no token that begins a document; leave it out"),
    ],
)
def test_mistakes_are_found_before_anything_is_created(overrides, says, tiny_corpus, folder, tmp_path):
    tokenizer_files.write(folder / "bare", tokenizer_files.byte_level())
    given = [each.format(tokenizer=folder) for each in overrides]
    done = run("pretrain", *arguments(tiny_corpus, folder, tmp_path / "run", "train.steps=1", *given))
    assert done.returncode == 78 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
