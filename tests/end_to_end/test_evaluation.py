"""`launch/eval.py` repeats what training logged, in the run's own precision and compile mode, in any world size."""

import json
import shutil
from pathlib import Path

import pytest
from support.programs import TINY, run, summary
from support.tiny import TinyCorpus, synthetic_documents, write_documents

pytestmark = pytest.mark.slow


def evaluate(checkpoint: Path, out: Path, *extra: str, processes: int = 1) -> dict:
    done = run("eval", "--checkpoint", str(checkpoint), "--out", str(out), *extra, processes=processes)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp32-compiled"])
def test_same_loss_as_training_logged(mode: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    precision, _, compiled = mode.partition("-")
    if compiled and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    extra = (f"train.precision={precision}", f"train.compile={'true' if compiled else 'false'}", "train.steps=5")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", *extra)
    assert done.returncode == 0, done.stderr
    logged = summary(tmp_path / "run")["val_loss"]["default"]
    for processes in (1, 2):
        told = evaluate(tmp_path / "run", tmp_path / f"eval{processes}.json", processes=processes)
        assert told["step"] == 5
        assert told["sets"]["default"]["loss"] == pytest.approx(logged, rel=1e-6, abs=1e-6)


def test_other_text_moved_run_and_damaged_checkpoints(tiny_corpus: TinyCorpus, tmp_path: Path):
    extra = ("train.steps=4", "checkpoint.every=2")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", *extra)
    assert done.returncode == 0, done.stderr
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    other = write_documents(tmp_path / "other.json.gz", synthetic_documents(30, seed=77))
    told = evaluate(moved, tmp_path / "a.json", "--data", f"news={other}", "--sequences", "0")["sets"]["news"]
    assert told["perplexity"] == pytest.approx(2.718281828 ** told["loss"], rel=1e-6)
    text_bytes = sum(len(text.encode()) for text in synthetic_documents(30, seed=77))
    # All of the text: bits a byte times bytes are the bits of all tokens, but for the first of the corpus.
    bits = told["loss"] * told["tokens"] / 0.6931471805599453
    assert bits / text_bytes == pytest.approx(told["bits_per_byte"], rel=1e-3)

    with (moved / "checkpoints" / "step-00000004" / "state.json").open("r+b") as file:
        file.write(b"x")
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["checkpoint"].endswith("step-00000004")
    fallen_back = evaluate(moved, tmp_path / "b.json")
    assert fallen_back["step"] == 2
    named = run("eval", "--checkpoint", str(moved / "checkpoints" / "step-00000004"))
    assert named.returncode == 78
    assert "is damaged" in named.stderr
    assert "Traceback" not in named.stderr
